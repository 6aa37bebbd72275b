"""What a call costs on the host: small forward + backward passes of this checkout and of another, interleaved, on one thread.

python benchmarks/call_cost.py /path/to/another/checkout [--rounds N]

Prints for each case the medians and their ratio. With ``heads``: eager PyTorch beside it. The own share of ``AttributionLoss`` is a call
where the gradients of the score are given. The last rows are no times but the Python and C
functions that a call of the Triton backend enters, with Triton's own launch left out (``JITFunction.run`` does nothing)."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BATCH = 60  # calls of a case, in a row


def work() -> None:
    """In a process of its own, with the package of one checkout: reads names of cases, writes medians in microseconds, or counts."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = cases()
    for line in sys.stdin:
        name, count = json.loads(line)
        call = made[name]
        value = entered(call) if name.startswith("calls") else median(call, count)
        print(json.dumps(value), flush=True)


def median(call: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def entered(call: Callable[[], object]) -> int:
    call()
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    call()
    sys.setprofile(None)
    return count


def cases() -> dict[str, Callable[[], object]]:
    import torch
    import torch.nn.functional as F

    import modreg_fast as mrf
    import modreg_fast.losses.attribution as losses_attribution
    from modreg_fast.functional import gradient_statistics, softmax_fisher_information

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    heads = [leaf(64, 512) for _ in range(2)]
    upstream = torch.randn(2, 1, 64)

    def eager() -> None:
        q = F.softmax((heads[0] + heads[1]) / 2, 1)
        out = []
        for x in heads:
            log_p = F.log_softmax(x, 1)
            out.append((log_p.exp() - q).square().sum(1) / (-(q * log_p).sum(1) + 1e-8))
        torch.autograd.grad(torch.stack(out)[:, None], heads, upstream)

    def fisher(backend: str | None = None) -> None:
        torch.autograd.grad(softmax_fisher_information([[x] for x in heads], backend=backend), heads, upstream)

    features = {m: [leaf(2, c, n, n) for c, n in ((32, 16), (64, 8), (128, 4), (256, 2))] for m in ("rgb", "depth")}
    flat = [x for row in features.values() for x in row]
    balance = mrf.FunctionalEntropyLoss()

    attribution, scores = mrf.AttributionLoss(), leaf(2, 10)
    slopes = [leaf(*x.shape) for x in flat]

    def attribute() -> None:
        losses_attribution.gradients = lambda *_: slopes  # in place of differentiating a head
        torch.autograd.grad(attribution(scores, features), [*slopes, *flat])

    compiled = torch.compile(lambda *x: softmax_fisher_information([[y] for y in x]), fullgraph=True)
    compiled_balance = torch.compile(lambda x: balance(x), fullgraph=True)

    def triton(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with mrf.use_backend("triton"):
                call()

        return run

    made: dict[str, Callable[[], object]] = {
        "heads, eager PyTorch": eager,
        "heads": fisher,
        "FunctionalEntropyLoss": lambda: torch.autograd.grad(balance(features), flat),
        "AttributionLoss, its own share": attribute,
        "heads, compiled": lambda: torch.autograd.grad(compiled(*heads), heads, upstream),
        "FunctionalEntropyLoss, compiled": lambda: torch.autograd.grad(compiled_balance(features), flat),
    }
    if stub_triton():
        made["calls: heads, triton"] = triton(fisher)
        made["calls: FunctionalEntropyLoss, triton"] = triton(made["FunctionalEntropyLoss"])
        made["calls: gradient_statistics, triton"] = triton(
            lambda: torch.autograd.grad(gradient_statistics(heads[:1], heads[1:]).attribution.sum(), heads)
        )
    return made


def stub_triton() -> bool:
    """Lets the Triton backend take tensors on the CPU, and launch nothing."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return False
    from modreg_fast.backends import _REGISTRY, _STATUS, BackendStatus, _Entry

    JITFunction.run = lambda self, *args, **kwargs: None
    _STATUS["triton"] = BackendStatus(True, "a stub")
    _REGISTRY["triton"] = _Entry(("cpu",), "modreg_fast.backends.triton")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    trees = [options.other.resolve(), Path(__file__).resolve().parents[1]]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--work"],
            env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for tree in trees
    ]

    def ask(worker: subprocess.Popen[str], name: str, count: int) -> float:
        assert worker.stdin is not None and worker.stdout is not None
        print(json.dumps([name, count]), file=worker.stdin, flush=True)
        return float(json.loads(worker.stdout.readline()))

    sys.path.insert(0, str(trees[1]))
    names = list(cases())
    found: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for name in names:
        for round_ in range(-1 if not name.startswith("calls") else options.rounds - 1, options.rounds):
            for worker, values in zip(workers, found[name], strict=True):
                value = ask(worker, name, BATCH)
                if round_ >= 0:  # the first warms up
                    values.append(value)
    medians = {name: [statistics.median(values) for values in both] for name, both in found.items()}
    print(f"| {'case':36} | {'other':>8} | {'this':>8} | ratio |\n|---|---|---|---|")
    for name, (other, this) in medians.items():
        print(f"| {name:36} | {other:8.0f} | {this:8.0f} | {this / other:5.2f} |")
    ratios = [medians["heads, eager PyTorch"][i] / medians["heads"][i] for i in range(2)]
    print(f"heads, times faster than eager PyTorch: {ratios[0]:.1f} and {ratios[1]:.1f}")
    for worker in workers:
        worker.terminate()


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
