"""``python -m benchmarks.gpu_validate`` without a GPU: that a bad step shows, that its checks can fail, and, slow, the whole dry run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_validate import checks, page, steps, tools  # noqa: E402
from benchmarks.gpu_validate.__main__ import main  # noqa: E402
from benchmarks.gpu_validate.runner import Step, passed, run  # noqa: E402
from benchmarks.gpu_validate.work import OPS, work  # noqa: E402

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


def test_whatever_happens_to_a_step_the_rest_goes_on(tmp_path, capsys):
    seconds = {"crashed after its time": 1.0}
    outcomes = run([Step(n, [sys.executable, "-c", c], os.environ, seconds.get(n, 60)) for n, c in STEPS.items()])
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


@pytest.mark.slow
def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_validate", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    status = {step["name"]: step["status"] for step in report["steps"]}
    assert report["dry_run"] and report["passed"] and len(status) == 15
    assert {name for name, s in status.items() if s != "passed"} == {"sanitizers triton", "sanitizers cuda", "bytes triton"}
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 3 and all(name in text for name in status)
