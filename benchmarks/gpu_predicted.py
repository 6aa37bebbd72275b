"""Prints what the model of ``modreg_fast.bench.roofline`` predicts for the kernels that an H200 has run, beside what was measured.

results/nvidia-h200-kernels.json holds, per row, the measured time of a call and what the PTX interpreter and ptxas counted in its kernel,
per element; of some also the bank conflicts per 32 elements, as counted here and by Nsight Compute.

python benchmarks/gpu_predicted.py"""

import json
from pathlib import Path

from modreg_fast.bench.roofline import H200, Work

FILE = Path(__file__).parent / "results/nvidia-h200-kernels.json"


def rows() -> list[dict]:
    """With ``predicted``, in milliseconds, and ``ratio``, how many times as long that is as what was measured."""
    found = json.loads(FILE.read_text())["rows"]
    for row in found:
        row["predicted"] = H200.predicted(Work(row["bytes"], row["counts"], row["resident"])) * row["elements"] / 1e9
        row["ratio"] = row["predicted"] / row["milliseconds"]
    return found


def main() -> None:
    print("| backend | op | channels | dtype | side by side | pass | measured, ms | predicted | ratio | conflicts | by Nsight |")
    print("| --- " * 11 + "|")
    for row in rows():
        case = f"{row['pass']}{', noise' if row['noise'] else ''}"
        seen = row.get("bank_conflicts")
        conflicts = f"{seen['counted']:.1f} | {seen['nsight']:.1f}" if seen else " | "
        print(
            f"| {row['backend']} | {row['op']} | {row['channels']} | {row['dtype']} | {row['layout']} | {case} | "
            f"{row['milliseconds']:.2f} | {row['predicted']:.2f} | {row['ratio']:.2f} | {conflicts} |"
        )


if __name__ == "__main__":
    main()
