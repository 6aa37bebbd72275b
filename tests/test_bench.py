"""The benchmark command: its numbers mean what the columns say."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", exc_type=ImportError)
pytest.importorskip("matplotlib", exc_type=ImportError)

from rich.console import Console  # noqa: E402

from modreg_fast import bench  # noqa: E402
from modreg_fast.bench import measure as measuring  # noqa: E402
from modreg_fast.bench import providers, report, results  # noqa: E402
from modreg_fast.bench import run as running  # noqa: E402
from modreg_fast.bench.cases import BASELINES, DTYPES, MODES, OPS, Case, own_backends, select, takes  # noqa: E402
from modreg_fast.bench.figures import figures  # noqa: E402
from modreg_fast.bench.measure import Copy, measure  # noqa: E402
from modreg_fast.bench.memory import allocations, peak  # noqa: E402
from modreg_fast.bench.shapes import SHAPES, Shape  # noqa: E402

TINY = Shape("tiny", 2, ((2, 4, 8, 8), (2, 6, 4, 4)))
TOKENS = Shape("tiny-tokens", 3, ((2, 5, 7),), channel_dim=-1)
HEADS = Shape("tiny-heads", 2, ((4, 6),))


def tiny_cases() -> list[Case]:
    def case(op: str, shape: Shape, **options: object) -> Case:
        baselines = ("eager", "gat") if op == "softmax_fisher" else ("eager",)
        return Case(op, shape, layout=shape.layouts[0], providers=baselines + own_backends(op), **options)

    plain = [case(op, shape) for op in OPS for shape in (TINY, TOKENS, HEADS) if takes(op, shape)]
    return plain + [
        case("softmax_fisher", TINY, dtype="bfloat16"),
        replace(case("gradient_statistics", TINY), layout="channels"),
        *(Case("softmax_fisher", TINY, samples=n, providers=own_backends("softmax_fisher")) for n in (1, 3)),
    ]


def rows_of(case: Case) -> list[results.Row]:
    copy = Copy(2**14)
    return results.rows(case, *measure(case, copy, budget=0, turn=0), copy.bytes)


@pytest.fixture(scope="module")
def tiny_rows() -> list[results.Row]:
    return [row for case in tiny_cases() for row in rows_of(case)]


def test_every_case_gives_every_mode_and_column(tiny_rows):
    expected = [(str(case), mode, p) for case in tiny_cases() for mode in MODES for p in case.providers]
    assert len(tiny_rows) == len(expected)
    for row in tiny_rows:
        for name, value in asdict(row).items():
            if value is None:
                assert name == "ratio_compile" or (name == "ratio_eager" and row.samples)
            elif isinstance(value, float):
                assert isfinite(value) and (value > 0 or name in ("spread_ms", "relative_error", "peak_fraction")), (name, value)
            else:
                assert value != ""
        assert row.calls >= 3
        assert row.relative_error < (1e-2 if row.dtype == "bfloat16" else 1e-5)
        assert row.provider != "eager" or row.ratio_eager == 1


def test_speed_columns_agree_with_each_other(tiny_rows):
    for row in tiny_rows:
        assert row.gb_per_s == pytest.approx(row.bytes / row.median_ms / 1e6)
        assert row.copy_share == pytest.approx(row.gb_per_s / row.copy_gb_per_s)
        if row.ratio_eager is not None:
            (eager,) = (x for x in tiny_rows if x.key == replace(row, provider="eager").key)
            assert row.ratio_eager == pytest.approx(eager.median_ms / row.median_ms)


def test_files_hold_the_rows(tiny_rows, tmp_path):
    results.write_csv(tiny_rows, tmp_path / "rows.csv")
    (tmp_path / "rows.json").write_text(results.json_of(tiny_rows))
    assert results.read_csv(tmp_path / "rows.csv") == tiny_rows
    assert results.read_json(tmp_path / "rows.json") == tiny_rows
    assert (tmp_path / "rows.csv").read_text().splitlines()[0] == ",".join(results.COLUMNS)


def test_bytes_of_the_headline_shape():
    features = 2 * (2 * 64 * 512 * 512) * 4
    case = Case("softmax_fisher", SHAPES["square"])
    assert [case.bytes_moved(mode) for mode in MODES] == [features, 2 * features, 3 * features]
    assert replace(case, dtype="bfloat16").bytes_moved("forward") == features // 2
    statistics = 2 * features + 2 * (2 * 512 * 512) * 4  # gradients, features, and the values
    assert Case("gradient_statistics", SHAPES["square"]).bytes_moved("both") == 3 * statistics


@pytest.mark.parametrize(
    ("op", "shape"), [(op, shape) for op in OPS for shape in (TINY, TOKENS, HEADS) if takes(op, shape)], ids=str
)
def test_bytes_are_those_of_the_inputs(op, shape):
    for dtype in DTYPES:
        for layout in shape.layouts:
            case = Case(op, shape, dtype, layout)
            inputs = providers.make_inputs(case)
            if op == "modality_cross_entropy":
                inputs.append(providers.make_target(case))
            assert sum(x.nbytes for x in inputs) == case.input_bytes


def test_layouts_are_laid_out():
    pixels, channels = (providers.make_inputs(Case("softmax_fisher", TINY, layout=layout))[0] for layout in TINY.layouts)
    assert pixels.stride(3) == 1 and channels.stride(1) == 1 and torch.equal(pixels, channels)


def test_segformer_shapes():
    assert SHAPES["segformer-b2-1024-m4"].sizes == ((2, 64, 256, 256), (2, 128, 128, 128), (2, 320, 64, 64), (2, 512, 32, 32))
    assert SHAPES["segformer-b0-512-m2"].sizes == ((2, 32, 128, 128), (2, 64, 64, 64), (2, 160, 32, 32), (2, 256, 16, 16))
    assert SHAPES["pixels-2^14"].pixels == 2**14 and SHAPES["pixels-2^24"].pixels == 2**24


def test_peak_memory_of_known_allocations():
    before = torch.empty(5 * 2**20, dtype=torch.uint8)

    def call() -> torch.Tensor:
        nonlocal before
        del before  # not ours to subtract
        a = torch.empty(2**20, dtype=torch.uint8)
        b = torch.empty(2 * 2**20, dtype=torch.uint8)
        del a
        c = torch.empty(2**19, dtype=torch.uint8)
        del b
        return c

    kept, events = allocations(call)
    assert peak(events) == 3 * 2**20
    assert sum(events) == kept.nbytes


def test_memory_of_a_pass_counts_its_gradients(tiny_rows):
    elements = {shape.name: shape.elements for shape in (TINY, TOKENS, HEADS)}
    # Whose graph, gone by the end of the pass, is larger than the gradients.
    graphs = [("softmax_fisher", "gat"), ("modality_cross_entropy", "eager")]
    for row in tiny_rows:
        if row.mode != "forward" and (row.op, row.provider) not in graphs:
            assert row.peak_bytes >= elements[row.shape] * DTYPES[row.dtype].itemsize
            assert row.peak_fraction >= 1 or row.op == "modality_cross_entropy"  # whose target has no gradient


def test_error_column_shows_a_wrong_backend(monkeypatch):
    case = replace(tiny_cases()[0], providers=("eager", "planted"))

    def build(provider: str, case: Case) -> providers.Function:
        right = providers.public(case, "reference")
        return right if provider == "eager" else lambda leaves: [1.001 * x for x in right(leaves)]

    monkeypatch.setattr(measuring, "build", build)
    for row in rows_of(case):
        if row.provider == "planted":
            assert row.relative_error == pytest.approx(1e-3, rel=0.01)
        else:
            assert row.relative_error < 1e-5


def test_error_is_that_of_the_worst_scale(monkeypatch):
    def build(provider: str, case: Case) -> providers.Function:
        right = providers.public(case, "reference")
        return lambda leaves: right([x if x.shape[1] == 4 else x * 1.01 for x in leaves])

    monkeypatch.setattr(measuring, "build", build)
    assert all(row.relative_error > 1e-3 for row in rows_of(replace(tiny_cases()[0], providers=("eager",))))


@pytest.mark.parametrize("op", OPS)
def test_formula_given_to_the_compiler(op, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for row in rows_of(Case(op, TOKENS, layout="channels", providers=("compile",))):
        assert row.relative_error < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("op", OPS)
def test_compiled_formula(op):
    shape = TINY if takes(op, TINY) else HEADS
    for row in rows_of(Case(op, shape, layout=shape.layouts[0], providers=("eager", "compile"))):
        assert row.relative_error < 1e-5 and row.ratio_compile > 0


def test_figures_across_rows(tiny_rows):
    row = next(row for row in tiny_rows if row.provider == "eager" and row.op == "softmax_fisher")
    row = replace(row, provider="cpu", shape="square", mode="forward", median_ms=20.0)
    variants = [
        replace(row, dtype="bfloat16", median_ms=10.0),
        replace(row, samples=1, median_ms=30.0),
        replace(row, samples=8, median_ms=120.0),
        replace(row, threads=1, median_ms=38.0),
        replace(row, shape="pixels-2^14", median_ms=2**14 * 3e-6),
    ]
    found = dict(figures([row, *variants]))
    assert sorted(found.values()) == ["0.50", "1.90x", "2.00x", "2^14: 3.00"]


def test_comparison_prints_ratios(tiny_rows):
    faster = [replace(row, median_ms=row.median_ms / 4) for row in tiny_rows]
    where = Console(record=True, width=200, quiet=True)
    with where.capture() as captured:
        where.quiet = False
        report.print_comparison(tiny_rows, faster[1:], where)
    text = captured.get()
    assert text.count("0.25") >= len(faster) - 1
    assert f"{len(faster) - 1} rows in both runs, 0 only in the new, 1 only in the old one" in text


def test_default_set_and_options():
    names = {case.shape.name for case in select()}
    assert {"heads", "tokens", "square", "deliver", "segformer-b0-512-m2", "segformer-b2-1024-m4"} <= names
    assert {case.op for case in select()} == set(OPS)
    assert len({str(case) for case in select()}) == len(select())
    (only,) = {case.shape.name for case in select(["tokens"])}
    assert only == "tokens"
    assert {(c.dtype, c.layout) for c in select(["square"])} == {(d, x) for d in DTYPES for x in ("pixels", "channels")}
    assert not any("compile" in case.providers for case in select(quick=True))
    assert all(provider in BASELINES or provider in own_backends(case.op) for case in select() for provider in case.providers)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(running, "select", lambda only, quick: [tiny_cases()[0], tiny_cases()[3]])
    monkeypatch.setattr(running, "Copy", lambda: Copy(2**14))
    monkeypatch.setattr(running, "measure", lambda case, copy, budget: measure(case, copy, budget=0, turn=0))
    assert bench.main(parse("--quick", "--output", str(tmp_path / "new"), "--threads", "1", "2")) == 0
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {"results.csv", "results.json", "speed.png", "bandwidth.png", "memory.png"}
    assert {row.threads for row in results.read_csv(tmp_path / "new" / "results.csv")} == {1, 2}
    assert bench.main(parse("--compare", str(tmp_path / "new" / "results.json"))) == 0
    printed = capsys.readouterr().out
    assert "x compile" in printed and "new / old" in printed
    assert bench.main(parse("--json", "--threads", "1")) == 0
    told = capsys.readouterr()
    assert {row["provider"] for row in json.loads(told.out)} >= {"eager", "cpu"} and "x compile" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "sqare"], "unknown shape 'sqare'; there are: heads, tokens"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--compare", "missing.json"], "missing.json does not hold the rows of a run"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert bench.main(parse(*arguments)) == 2
    assert message in capsys.readouterr().err


def test_message_without_the_extra(monkeypatch, capsys):
    for name in ("run", "report"):
        monkeypatch.delitem(sys.modules, f"modreg_fast.bench.{name}")
        monkeypatch.delattr(bench, name)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert bench.main(parse()) == 1
    assert "modreg-fast bench: needs the package rich.console: pip install 'modreg_fast[examples]'" in capsys.readouterr().err


def test_package_does_not_import_the_extra():
    code = "import sys, modreg_fast, modreg_fast.bench; sys.exit(bool({'rich', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
