"""The errors of hard inputs, for the tables of docs/numerics.md: relative, in norm, against float64, beside those of the plain formula.

python benchmarks/numerics.py"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import helpers
import oracle
import test_numerics as numerics

from modreg_fast.functional import modality_cross_entropy


def softmax_fisher() -> None:
    print("| input | values | plain | gradients | plain |\n|---|---|---|---|---|")
    for case in numerics.HARD:
        features = [[x.requires_grad_()] for x in numerics.hard(case, 2)]
        information, gradients, upstream = numerics.compute(features, "cpu")
        plain = numerics.plain(features, upstream)
        values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
        expected = [row[0] for row in expected]
        if abs(values).max() < numerics.RESOLUTION / 1e-5:
            continue  # so small that float64 does not resolve it either
        print_row(case, (information, plain[0], values), (gradients, plain[1], expected))


# Logits (M, 2, 19, 12, 16) from normal numbers and the target's distribution. "right": the target is all but certain.
CROSS_ENTROPY = {
    "ordinary": lambda x, target: 2 * x,
    "right_5": lambda x, target: x + 5 * target,
    "right_10": lambda x, target: x + 10 * target,
    "right_15": lambda x, target: x + 15 * target,
    "wrong_80": lambda x, target: x - 80 * target,
    "wrong_200": lambda x, target: x - 200 * target,
    "one_sure_one_not": lambda x, target: x + torch.tensor([15.0, 0.0]).view(2, 1, 1, 1, 1) * target,
    "saturated_80": lambda x, target: 80 * x.sign(),
    "spread_30": lambda x, target: 30 * x,
    "huge": lambda x, target: 1e4 * x,
    "learnt_1e-2": lambda x, target: target.log() + 1e-2 * x,
    "learnt_1e-4": lambda x, target: target.log() + 1e-4 * x,
    "offset": lambda x, target: x + torch.tensor([1e4, -1e4]).view(2, 1, 1, 1, 1),
}


def cross_entropy() -> None:
    print("| input | cross entropies | plain | information | plain | gradients | plain |\n|---|---|---|---|---|---|---|")
    target = torch.randint(19, (2, 12, 16))
    hot = F.one_hot(target, 19).movedim(-1, 1).float()
    for case, made in CROSS_ENTROPY.items():
        smoothing = 0.1 if case.startswith("learnt") else 0.0
        t = (1 - smoothing) * hot + smoothing / 19
        logits = [x.requires_grad_() for x in made(torch.randn(2, *t.shape), t).unbind()]
        sums = modality_cross_entropy(logits, target, label_smoothing=smoothing, backend="cpu")[:3]
        upstream = [torch.randn_like(x) for x in sums]
        options = {"smoothing": smoothing, "upstream": helpers.wide(upstream)}
        (own, joint, information, _), expected = oracle.modality_cross_entropy(helpers.wide(logits), target.numpy(), **options)
        plain = plain_cross_entropy(logits, target, t, smoothing)
        ours, theirs = (helpers.gradients(list(x), logits, upstream) for x in (sums, plain))
        losses, plain_losses = list(sums[:2]), list(plain[:2])
        print_row(case, (losses, plain_losses, [own, joint]), (sums[2], plain[2], information), (ours, theirs, expected))


def plain_cross_entropy(
    logits: list[torch.Tensor], target: torch.Tensor, t: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, ...]:
    """The formula as one writes it in PyTorch, in float32 throughout."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)

    own = torch.stack([loss(x) for x in logits])
    squares = torch.stack([(x.softmax(1) - t).square().sum(1) for x in logits])
    return (
        own.flatten(2).sum(2),
        loss(torch.stack(logits).mean(0)).flatten(1).sum(1),
        (squares / (own + oracle.EPS)).flatten(2).sum(2),
    )


def print_row(case: str, *rows: tuple[object, object, object]) -> None:
    """Of every quantity the errors of ours and of the plain formula."""
    errors = [helpers.relative_error(x, exact) for ours, plain, exact in rows for x in (ours, plain)]
    print(f"| `{case}` |", " | ".join(f"{error:.0e}" for error in errors), "|")


def main() -> None:
    torch.manual_seed(0)
    softmax_fisher()
    print()
    cross_entropy()


if __name__ == "__main__":
    main()
