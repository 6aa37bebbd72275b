"""The errors of hard inputs, for the table of docs/numerics.md: relative, in norm, against float64, beside those of the plain formula.

python benchmarks/numerics.py"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import helpers
import oracle
import test_numerics as numerics


def main() -> None:
    torch.manual_seed(0)
    print("| input | values | plain | gradients | plain |\n|---|---|---|---|---|")
    for case in numerics.HARD:
        features = [[x.requires_grad_()] for x in numerics.hard(case, 2)]
        information, gradients, upstream = numerics.compute(features, "cpu")
        plain = numerics.plain(features, upstream)
        values, expected = oracle.softmax_fisher(helpers.wide(features), upstream=helpers.wide(upstream))
        expected = [row[0] for row in expected]
        if abs(values).max() < numerics.RESOLUTION / 1e-5:
            continue  # so small that float64 does not resolve it either
        pairs = (information, values), (plain[0], values), (gradients, expected), (plain[1], expected)
        print(f"| `{case}` |", " | ".join(f"{helpers.relative_error(*pair):.0e}" for pair in pairs), "|")


if __name__ == "__main__":
    main()
