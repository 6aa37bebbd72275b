"""Calls of the ops, forward and backward, on tensors that stay where they are: what the steps run, and, as a command, what
``compute-sanitizer`` and ``ncu`` watch.

    python -m benchmarks.gpu_validate.work BACKEND [--dry-run] [--op OP]"""

import argparse
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from modreg_fast import functional, ops
from modreg_fast.backends import computes
from modreg_fast.backends.reference.softmax_fisher import Problem

OPS = ("softmax_fisher", "gradient_statistics", "modality_cross_entropy")


def ops_of(backend: str) -> list[str]:
    return [op for op in OPS if computes(backend, op)]


@dataclass
class Work:
    """``inputs``: features ``(B, C, P)``; gradient and feature of one tensor. ``seed``: of the noise, on the device, as a graph needs it;
    None for neither noise nor mask."""

    op: str
    backend: str
    inputs: list[Tensor]
    values: Tensor
    mask: Tensor
    seed: Tensor | None

    def __call__(self) -> list[Tensor]:
        """Results, then gradients."""
        results = self.forward()
        return [*(x.detach() for x in results), *torch.autograd.grad(sum(x.sum() for x in results), self.inputs)]

    def forward(self) -> list[Tensor]:
        masks = [] if self.seed is None else [self.mask]
        if self.op == "softmax_fisher":
            noise = [0.0, 0.0] if self.seed is None else [0.5, 0.0]
            problem = Problem(self.inputs, masks, None, noise, 2, self.seed, False, 1e-8)
            return [ops.softmax_fisher(problem, self.backend).information]
        if self.op == "modality_cross_entropy":
            target = classes(self.values, self.inputs[0].shape[1])
            target = target if self.seed is None else torch.where(self.mask, target, -100)
            return list(functional.modality_cross_entropy(self.inputs, target, backend=self.backend)[:3])
        found = functional.gradient_statistics(
            self.inputs[:1], self.inputs[1:], [self.values], mask=masks or None, backend=self.backend
        )
        return [x for x in (found.fisher, found.attribution) if x is not None]

    def refill(self) -> None:
        """Other numbers in the same memory."""
        with torch.no_grad():
            for x in (*self.inputs, self.values):
                x.uniform_(0.1, 1.1)
            if self.seed is not None:
                self.mask.copy_(torch.rand(self.mask.shape, device=self.mask.device) > 0.3)
                self.seed.add_(1)

    def bytes_of(self, mode: str) -> int:
        """That a pass without mask must move: inputs once, and backward the gradients, without the results."""
        once = sum(x.numel() * x.element_size() for x in self.inputs)
        values = self.values.numel() * {"softmax_fisher": 0, "gradient_statistics": 4, "modality_cross_entropy": 8}[self.op]
        return once + values + (once if mode == "backward" else 0)


def classes(values: Tensor, channels: int) -> Tensor:
    """A target, of values between 0.1 and 1.1."""
    return (values.sub(0.1) * channels).long().clamp_(0, channels - 1)


def work(
    op: str, backend: str, device: str, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, plain: bool = False
) -> Work:
    batch, channels, pixels = shape

    def tensor() -> Tensor:
        x = torch.randn(batch, channels, pixels, device=device).to(dtype)
        return (x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "channels" else x).requires_grad_()

    return Work(
        op=op,
        backend=backend,
        inputs=[tensor() for _ in range(2)],
        values=torch.rand(batch, pixels, device=device).add(0.1),
        mask=torch.rand(batch, pixels, device=device) > 0.3,
        seed=None if plain else torch.tensor(7, device=device),
    )


def odd_works(backend: str, device: str) -> list[Work]:
    """Sizes that fill neither tiles nor vectors, in every dtype and layout; on the CPU, where interpreters run them, one of each op."""
    kinds = [
        ("softmax_fisher", (2, 19, 77), torch.float16, "channels"),
        ("gradient_statistics", (2, 19, 77), torch.bfloat16, "pixels"),
        ("modality_cross_entropy", (2, 19, 77), torch.bfloat16, "channels"),
        ("modality_cross_entropy", (2, 25, 333), torch.float32, "pixels"),
        ("softmax_fisher", (2, 19, 77), torch.float32, "pixels"),
        ("softmax_fisher", (1, 300, 40), torch.bfloat16, "pixels"),
        ("gradient_statistics", (3, 130, 1001), torch.float64, "channels"),
        ("gradient_statistics", (2, 64, 4096), torch.float32, "pixels"),
    ]
    kinds = [kind for kind in (kinds[:3] if device == "cpu" else kinds) if computes(backend, kind[0])]
    return [work(op, backend, device, *kind) for op, *kind in kinds]


def large(op: str, backend: str, dry_run: bool) -> Work:
    """Larger than the caches of a GPU, so that every byte comes from memory."""
    shape, device = ((1, 64, 128), "cpu") if dry_run else ((2, 64, 2**20), "cuda")
    assert dry_run or prod(shape) > 2**26
    return work(op, backend, device, shape, torch.float32, "pixels", plain=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--op", choices=OPS, help="one large call of this op, without noise and mask")
    options = parser.parse_args()
    if options.dry_run:
        from benchmarks.gpu_validate import interpreted

        interpreted.prepare(options.backend)
    device = "cpu" if options.dry_run else "cuda"
    works = [large(options.op, options.backend, options.dry_run)] if options.op else odd_works(options.backend, device)
    for each in works:
        assert all(torch.isfinite(x).all() for x in each()), f"{each.op}: not finite"
