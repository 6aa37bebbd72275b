"""``python -m benchmarks.gpu_validate`` without a GPU: that a bad step shows, that its checks can fail, and, slow, the whole dry run."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_validate import checks, page, speed, steps, tools  # noqa: E402
from benchmarks.gpu_validate.__main__ import main  # noqa: E402
from benchmarks.gpu_validate.runner import Step, passed, run  # noqa: E402
from benchmarks.gpu_validate.work import OPS, work  # noqa: E402
from modreg_fast.backends import measured  # noqa: E402
from modreg_fast.bench.results import Row  # noqa: E402

WRITE = "import json, sys; print('a word'); json.dump(dict(summary='seen', failures={}, tables={{}}, absent={}), open(sys.argv[1], 'w'))"
STEPS = {
    "passed": WRITE.format([], False),
    "failed": WRITE.format(["3 is <not> 4"], False),
    "absent": WRITE.format([], True),
    "crashed": "import os; os.abort()",
    "crashed by an exception": "raise RuntimeError('the reason')",
    "crashed in writing": "import sys; open(sys.argv[1], 'w').write('{')",
    "crashed after its time": "import time; time.sleep(60)",
    "passed at last": WRITE.format([], False),
}


@pytest.mark.parametrize("workers", [1, 3])
def test_whatever_happens_to_a_step_the_rest_goes_on(workers, tmp_path, capsys):
    seconds, seen = {"crashed after its time": 1.0}, []
    made = [Step(n, [sys.executable, "-c", c], os.environ, seconds.get(n, 60), alone="at last" in n) for n, c in STEPS.items()]
    outcomes = run(made, workers, written=lambda done: seen.append([o.name for o in done]))
    assert [len(names) for names in seen] == list(range(1, len(STEPS) + 1)) and seen[-1] == list(STEPS)
    assert all(names == [name for name in STEPS if name in names] for names in seen)  # the order of the steps, whoever is first
    assert [o.status for o in outcomes] == [name.split()[0] for name in STEPS]
    found = {o.name: o for o in outcomes}
    assert found["failed"].failures == ["3 is <not> 4"] and found["failed"].summary == "seen" and "a word" in found["failed"].log
    assert found["crashed"].summary == "ended with exit code -6"
    assert found["crashed by an exception"].failures == ["RuntimeError: the reason"]
    assert "stopped after 1 seconds" in found["crashed after its time"].summary
    assert "3 is <not> 4" in capsys.readouterr().out

    good = [o for o in outcomes if o.status in ("passed", "absent")]
    assert passed(good) and not any(passed([*good, o]) for o in outcomes if o not in good)
    page.write(outcomes, tmp_path, dry_run=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["passed"] and [s["name"] for s in report["steps"]] == list(STEPS)
    text = (tmp_path / "report.html").read_text()
    assert all(name in text for name in STEPS) and "3 is &lt;not&gt; 4" in text and "FAILED" in text and "Dry run" in text
    page.write(good, tmp_path, dry_run=False)
    assert "FAILED" not in (tmp_path / "report.html").read_text()


FOUND = "import json, os, pathlib, sys, time; found = dict(summary='', failures=[], tables={}, absent=False)"
WROTE = "json.dump(found, open(sys.argv[1], 'w'))"
SPAN = f"{FOUND}; start = time.time(); time.sleep(0.2); found['tables'] = {{'span': [{{'from': start, 'to': time.time()}}]}}; {WROTE}"


def test_side_by_side_in_groups_and_alone(tmp_path):
    """Two that wait for each other, two of a group, which never meet, and two that meet nobody."""

    def waiting(mine: str, other: str) -> str:
        until = f"while not pathlib.Path({str(tmp_path / other)!r}).exists(): time.sleep(0.02)"
        return f"{FOUND}; pathlib.Path({str(tmp_path / mine)!r}).touch()\n{until}\n{WROTE}"

    kinds = {"alone 1": {"alone": True}, "g1": {"group": "memory"}, "g2": {"group": "memory"}, "alone 2": {"alone": True}}
    made = [Step(mine, [sys.executable, "-c", waiting(mine, other)], os.environ, 60.0) for mine, other in ("ab", "ba")]
    outcomes = run([*made, *(Step(n, [sys.executable, "-c", SPAN], os.environ, **kind) for n, kind in kinds.items())], workers=4)
    assert [o.name for o in outcomes] == ["a", "b", *kinds] and passed(outcomes)
    spans = sorted((o.tables["span"][0]["from"], o.tables["span"][0]["to"]) for o in outcomes[2:])
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))


def test_minutes(tmp_path):
    """What runs into the end is stopped, what comes later is left out, and neither is a failure; a step knows its time."""
    made = [
        Step(name, [sys.executable, "-c", "import time; time.sleep(60)"], os.environ, group="one") for name in ("long", "late")
    ]
    start = time.monotonic()
    long, late = run(made, workers=1, minutes=0.05)
    assert time.monotonic() - start < 20 and [o.status for o in (long, late)] == ["left out"] * 2 and passed([long, late])
    assert "was stopped after 2 seconds" in long.summary and late.summary == "there was no time left for it"
    page.write([long, late], tmp_path, dry_run=False)
    assert "left out" in (tmp_path / "report.html").read_text()

    tell = f"{FOUND}; found['summary'] = os.environ['GPU_VALIDATE_SECONDS']; {WROTE}"
    told, alone = run(
        [Step(name, [sys.executable, "-c", tell], os.environ, alone=name == "alone") for name in ("told", "alone")], minutes=10
    )
    assert 300 < float(told.summary) <= 330 and 500 < float(alone.summary) <= 600


def test_only(tmp_path, capsys):
    names = [step.name for step in steps.plan(False, tmp_path)]
    chosen = [step.name for step in steps.plan(False, tmp_path, ["parity", "bits cuda"])]
    assert chosen == ["parity triton", "parity cuda", "bits cuda"] and set(chosen) < set(names)
    with pytest.raises(ValueError, match="--only must name some of environment, tests, .*, got party"):
        steps.plan(False, tmp_path, ["party", "speed"])
    for options in (["--only", "nothing"], ["--minutes", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main(["--dry-run", "--output", str(tmp_path / "out"), *options])
        assert stopped.value.code == 2
    assert "--only must name" in capsys.readouterr().err


def test_what_is_timed_runs_alone(tmp_path):
    alone = {step.name for step in steps.plan(False, tmp_path) if step.alone}
    assert alone == {"bytes triton", "bytes cuda", "speed", "small"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert "finds no NVIDIA GPU here; --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("op", OPS)
def test_checks_see_what_is_wrong(op, monkeypatch):
    """On backend ``cpu`` there is nothing; what differs from call to call, or reads other memory, shows."""
    call = work(op, "cpu", "cpu", (2, 6, 40), torch.float32, "pixels")
    assert not checks.differing(call, 3) and not checks.differing_from_graph(call, 2)
    calls = iter(range(1, 100))
    monkeypatch.setattr(type(call), "__call__", lambda self: [self.inputs[0].detach() * next(calls)])
    assert checks.differing(call, 2) == [f"{op}, tensor 0: other bits in a repeat"]
    assert checks.differing_from_graph(call, 1) == [f"{op}, tensor 0: replay 0 differs"]


@pytest.mark.parametrize("layout", ["pixels", "channels"])
@pytest.mark.parametrize("op", OPS)
def test_strides_beyond_31_bits_on_the_cpu(op, layout, monkeypatch):
    assert not checks.beyond_31_bits(op, "cpu", "cpu", layout, pixels=24)
    results = checks._results

    def as_with_32_bits(op, x, values, backend):  # both samples from where the first is
        if backend == "cpu":
            x = [t[:1].expand_as(t) for t in x]
        return results(op, x, values, backend)

    monkeypatch.setattr(checks, "_results", as_with_32_bits)
    assert len(checks.beyond_31_bits(op, "cpu", "cpu", layout, pixels=24)) >= 3


NCU = """==PROF== Connected to process 42
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","42","softmax_fisher_forward_float32(SoftmaxFisher)","dram__bytes_read.sum","byte","1,048,576"
"0","42","softmax_fisher_forward_float32(SoftmaxFisher)","dram__bytes_write.sum","byte","96"
"1","42","_reduce_kernel","dram__bytes_read.sum","byte","4"
"2","42","_count_kernel","dram__bytes_read.sum","byte","8"
"3","42","_backward_kernel","dram__bytes_write.sum","byte","512.5"
==PROF== Disconnected
"""


def test_reads_what_ncu_prints():
    forward, backward = tools.by_pass(NCU)
    assert forward == {"pass": "forward", "read": 1048580.0, "written": 96.0}
    assert backward == {"pass": "backward", "read": 8.0, "written": 512.5}


def program(folder, text: str, code: int) -> str:
    file = folder / "tool"
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {code}\n")
    file.chmod(0o755)
    return str(file)


def test_tools_of_nvidia(tmp_path, monkeypatch):
    """Stand-ins that print what the tools print."""
    text = "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 2 errors\n"
    for code, expected in ((9, 3 * 3), (0, 0)):
        monkeypatch.setattr(tools, "tool", lambda name, dry_run, code=code: program(tmp_path, text, code))
        found = steps.sanitizers(steps.Where("cuda", False))
        assert len(found.failures) == expected and not found.absent
        assert found.summary.count("ERROR SUMMARY: 2 errors") == len(tools.SANITIZERS) == 3
    monkeypatch.setattr(tools, "tool", lambda name, dry_run: None)
    assert steps.sanitizers(steps.Where("cuda", False)).absent and steps.bytes_moved(steps.Where("cuda", False)).absent

    assert tools.profile(program(tmp_path, NCU, 0), "cuda", "softmax_fisher", []) == tools.by_pass(NCU)
    with pytest.raises(PermissionError, match="only administrators"):
        tools.profile(program(tmp_path, "==ERROR== ERR_NVGPUCTRPERM\n", 1), "cuda", "softmax_fisher", [])
    with pytest.raises(RuntimeError, match="exit code 3: no such thing"):
        tools.profile(program(tmp_path, "no such thing\n", 3), "cuda", "softmax_fisher", [])


def test_speed(monkeypatch):
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    *_, (found, failures, left_out) = speed.measure(True, 100.0)
    assert not failures and not left_out
    expected = set(itertools.product(OPS, ("eager", "cpu"), ("forward", "backward", "both")))
    assert {(row.op, row.provider, row.mode) for row in found} == expected
    assert all(row.median_ms > 0 and row.relative_error < 1e-5 for row in found)


def test_speed_walks_through_a_graph_once():
    """Compiled functions give the buffers of their graph away: a second backward pass over it fails."""
    case = speed.cases(True)[0]
    leaves, upstream = speed.make_inputs(case), speed.make_upstream(case)
    _, backward, both = speed._passes(speed.build("cpu", case), leaves, upstream)
    made, seen = [], []

    def outputs():
        made.append(speed.build("cpu", case)(leaves))
        return made[-1]

    timing = speed._timing(lambda given: (seen.append(given), backward(given)), "cpu", outputs)
    assert len(timing.seconds) == len(made) == len(seen) >= 5 and all(x is y for x, y in zip(made, seen, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        backward(made[0])
    both(), both()


def test_speed_stops_in_time():
    *_, (found, failures, left_out) = speed.measure(True, -1.0)
    assert not found and not failures and len(left_out) == len(speed.cases(True)) and "(time)" in left_out[0]


def test_what_is_timed_fills_the_table_of_the_faster_backend():
    """The cases cover every measured row of measured.py, and the step prints rows of its form."""
    wanted = {(op, size, layout, row[0]) for (op, _, size, layout), rows in measured.TIMES.items() for row in rows}
    sizes, channels = {"float32": 4, "bfloat16": 2}, steps.CHANNELS
    known = [case for case in speed.cases(False) if case.shape.name in channels]
    timed = {(case.op, sizes[case.dtype], case.layout, channels[case.shape.name]) for case in known}
    assert wanted <= timed
    plain = dict.fromkeys((field.name for field in Row.__dataclass_fields__.values()), 0)
    made = {"op": "softmax_fisher", "mode": "forward", "shape": "wide", "dtype": "bfloat16", "layout": "pixels"}
    times = {"triton": 0.4, "cuda": 0.3, "eager": 9.0}
    both = [Row(**plain | made | {"provider": name, "median_ms": ms}) for name, ms in times.items()]
    found = steps.faster([*both, Row(**plain | made | {"provider": "cuda", "mode": "backward"})])
    row = {"op": "softmax_fisher", "pass": "forward", "bytes": 2, "layout": "pixels", "channels": 512}
    assert found == [{**row, "triton": 0.4, "cuda": 0.3}]


def test_small_calls():
    found = speed.small(True)
    assert [(row["shape"], row["provider"]) for row in found] == [(s, p) for s in ("heads", "b0-128") for p in ("eager", "cpu")]
    assert all(row["forward"] > 0 and row["both"] > 0 for row in found)


@pytest.mark.slow
def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_validate", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    status = {step["name"]: step["status"] for step in report["steps"]}
    assert report["dry_run"] and report["passed"] and len(status) == 21
    assert {name for name, s in status.items() if s != "passed"} == {"sanitizers triton", "sanitizers cuda", "bytes triton"}
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 3 and all(name in text for name in status)
