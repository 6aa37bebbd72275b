"""Does a backend compute the definition? Relative errors of values and gradients against float64, per op, dtype and shape.

``modreg-fast parity``, or ``python -m modreg_fast.parity``. The truth is the reference backend in float64 on the very numbers that the
backend gets. Needs rich for its table."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from modreg_fast import functional
from modreg_fast._output import to_json
from modreg_fast.backends import backends, computes, resolve

OPS = ("softmax_fisher", "gradient_statistics", "modality_cross_entropy")

# Allowed, in values and in gradients. In 16 bits a gradient is rounded once more: by half a unit in the last place.
_ALLOWED = {
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-12, 1e-12),
    torch.bfloat16: (1e-5, 1e-5 + 2.0**-8),
    torch.float16: (1e-5, 1e-5 + 2.0**-11),
}


@dataclass(frozen=True)
class Problem:
    """One call of an op, on random numbers of deviation ``scale``."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    modalities: int = 2
    channels_last: bool = False
    masked: bool = False
    sigma: float = 0.0
    label_smoothing: float = 0.0
    scale: float = 1.0

    @property
    def description(self) -> str:
        options = [f"{self.modalities} tensors"] if self.modalities != 2 else []
        options += ["channels last"] if self.channels_last else []
        options += ["masked"] if self.masked else []
        options += [f"sigma {self.sigma}"] if self.sigma else []
        options += [f"label smoothing {self.label_smoothing}"] if self.label_smoothing else []
        options += [f"{self.scale:g} times as large"] if self.scale != 1.0 else []
        return ", ".join(options)


def problems(quick: bool = False) -> Iterator[Problem]:
    """Every dtype, layout, and size class of channels; pixels that fill no tile. ``quick``: one of each op and dtype."""
    if quick:
        for op in OPS:
            for dtype in _ALLOWED:
                yield Problem(op, (2, 19, 5, 7), dtype, masked=True, sigma=0.5 * (op == "softmax_fisher"))
        return
    for op in OPS:
        for dtype in _ALLOWED:
            for channels_last in (False, True):
                yield Problem(op, (2, 19, 15, 17), dtype, channels_last=channels_last, masked=True)
            yield Problem(op, (1, 1024, 3, 5), dtype)
        for shape in ((3, 5), (2, 1, 7), (2, 2, 1), (1, 64, 16, 16), (2, 150, 9, 7)):
            yield Problem(op, shape)
        yield Problem(op, (2, 19, 8, 8), modalities=4, masked=True)
    for dtype in _ALLOWED:
        yield Problem("softmax_fisher", (2, 19, 5, 7), dtype, sigma=0.5)
        yield Problem("modality_cross_entropy", (2, 19, 5, 7), dtype, masked=True, label_smoothing=0.1)
    yield Problem("softmax_fisher", (2, 7, 33), channels_last=True, masked=True, sigma=0.5, modalities=3)
    yield Problem("softmax_fisher", (2, 19, 12, 16), scale=5.0)
    yield Problem("modality_cross_entropy", (2, 19, 12, 16), scale=30.0)


@dataclass(frozen=True)
class Result:
    op: str
    dtype: str
    shape: tuple[int, ...]
    options: str
    values: float  # relative error, in norm
    gradients: float
    values_allowed: float
    gradients_allowed: float

    @property
    def passed(self) -> bool:
        return self.values <= self.values_allowed and self.gradients <= self.gradients_allowed


def check(problem: Problem, backend: str, device: torch.device) -> Result:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, channels, *spatial = problem.shape
    count = problem.modalities * (2 if problem.op == "gradient_statistics" else 1)
    tensors = [(problem.scale * random(*problem.shape)).to(device, problem.dtype) for _ in range(count)]
    if problem.channels_last:
        tensors = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in tensors]
    maps = [random(batch, *spatial).abs().add(0.1).to(device, torch.float32) for _ in range(problem.modalities)]
    mask = (random(batch, *spatial) > -0.5).to(device) if problem.masked else None
    classes = torch.randint(channels, (batch, *spatial), generator=generator).to(device)

    def outputs(inputs: list[Tensor], name: str) -> list[Tensor]:
        if problem.op == "softmax_fisher":
            return [
                functional.softmax_fisher_information(
                    [[x] for x in inputs], mask=mask, sigma=problem.sigma, samples=2, seed=7, backend=name
                )
            ]
        if problem.op == "modality_cross_entropy":
            target = torch.where(mask, classes, 255) if mask is not None else classes
            sums = functional.modality_cross_entropy(
                inputs, target, ignore_index=255, label_smoothing=problem.label_smoothing, backend=name
            )
            return list(sums[:3])
        half = problem.modalities
        values = [f.to(inputs[0].dtype if inputs[0].dtype == torch.float64 else f.dtype) for f in maps]
        result = functional.gradient_statistics(inputs[:half], inputs[half:], values, mask=mask, backend=name)
        return [x for x in (result.fisher, result.attribution) if x is not None]

    def run(inputs: list[Tensor], name: str) -> tuple[list[Tensor], list[Tensor]]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        results = outputs(inputs, name)
        # So large that gradients of single elements are about 1: float16 holds neither much smaller nor much larger ones.
        size = tensors[0][0].numel()
        scales = {
            "softmax_fisher": [size],
            "gradient_statistics": [size / channels, size**0.5],
            "modality_cross_entropy": [1.0, 1.0, 1.0],
        }[problem.op]
        upstream = [
            scale * torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=device).view(x.shape)
            for scale, x in zip(scales, results, strict=True)
        ]
        return [x.detach() for x in results], list(torch.autograd.grad(results, inputs, upstream))

    truth, true_gradients = run([x.double() for x in tensors], "reference")
    values, gradients = run(tensors, backend)
    return Result(
        problem.op,
        str(problem.dtype).removeprefix("torch."),
        problem.shape,
        problem.description,
        _relative_error(values, truth),
        _relative_error(gradients, true_gradients),
        *_ALLOWED[problem.dtype],
    )


def _relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """In norm, over all tensors together; NaN if any is."""
    a, e = (torch.cat([x.double().flatten() for x in tensors]) for tensors in (actual, expected))
    error, norm = torch.linalg.vector_norm(a - e), torch.linalg.vector_norm(e)
    return float(error) if float(norm) == 0 else float(error / norm)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = resolve(None, torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"), "parity")
    parser.add_argument(
        "--backend", default=default, metavar="NAME", help=f"one of {', '.join(backends())} (default here: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one problem of each op and dtype")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """Runs what ``add_arguments`` parsed: 0, 1 where an error is larger than allowed, 2 for a backend that is not usable here."""
    status = backends().get(options.backend)
    if status is None:
        print(f"modreg-fast parity: --backend must be one of {', '.join(backends())}, got {options.backend!r}", file=sys.stderr)
        return 2
    if not status.available:
        if options.backend == "triton" and not os.environ.get("TRITON_INTERPRET"):
            return _interpreted(options)
        print(f"modreg-fast parity: backend {options.backend!r} is not usable here: {status.detail}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if options.backend != "cpu" and torch.cuda.is_available() else "cpu")
    found = [problem for problem in problems(options.quick) if computes(options.backend, problem.op)]
    results = [check(problem, options.backend, device) for problem in found]
    failed = [result for result in results if not result.passed]
    if options.json:
        report: dict[str, Any] = {"backend": options.backend, "detail": status.detail, "device": str(device)}
        rows = [{**asdict(result), "passed": result.passed} for result in results]
        print(to_json({**report, "passed": not failed, "results": rows}), end="")
    else:
        _print(options.backend, status.detail, device, results)
    return 1 if failed else 0


def _interpreted(options: argparse.Namespace) -> int:
    """The same in a process with Triton's interpreter, which has to be on before Triton is imported."""
    command = [sys.executable, "-m", "modreg_fast.parity", "--backend", options.backend]
    command += [f"--{name}" for name in ("quick", "json") if getattr(options, name)]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


def _print(backend: str, detail: str, device: torch.device, results: list[Result]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        for result in results:
            print(result)
        return
    table = Table(title=f"{backend} on {device} ({detail}) against float64", title_justify="left")
    for heading in ("op", "dtype", "shape", "options"):
        table.add_column(heading)
    for heading in ("error of values", "allowed", "of gradients", "allowed", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        numbers = (result.values, result.values_allowed, result.gradients, result.gradients_allowed)
        table.add_row(
            result.op,
            result.dtype,
            "x".join(map(str, result.shape)),
            result.options,
            *(f"{x:.1e}" for x in numbers),
            "ok" if result.passed else "FAILED",
            style=None if result.passed else "red",
        )
    console = Console()
    console = Console(width=max(console.width, 130))
    console.print(table)
    failed = sum(not result.passed for result in results)
    console.print(f"relative errors, in norm; {len(results) - failed} of {len(results)} within what is allowed", highlight=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m modreg_fast.parity", description=__doc__)
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
