"""``modreg-fast audit``: the user's model and data by name, exit codes, messages."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from auditing import Page

import modreg_fast as mrf
from modreg_fast import cli
from modreg_fast.audit import Audit

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return 5 * self.a(x["a"]) + self.b(x["b"])

def build():
    torch.manual_seed(0)
    return Net()

def loader():
    torch.manual_seed(1)
    return [({"a": torch.randn(6, 3), "b": torch.randn(6, 3)}, torch.randint(4, (6,))) for _ in range(3)]

def metric():
    return half

def half(scores, target):
    return 0.5

def broken():
    raise ValueError("the file is gone")

def once():
    return iter(loader())

def forgets():
    half

number = 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "check.py").write_text(MODULE)
    (tmp_path / "mine" / "needs.py").write_text("import nothing_like_this\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


GIVEN = ["audit", "--model", "mine.check:build", "--data", "mine.check:loader"]


def test_command(project, capsys):
    path = list(sys.path)
    assert cli.main([*GIVEN, "--features", "a=a", "--features", "b=b", "--html", "page.html", "--plot", "plot.png"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("a carries ") and printed.err == "" and sys.path == path
    assert Page((project / "page.html").read_text()) and (project / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*GIVEN, "--json", "--metric", "mine.check:metric"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["scales"] == ["input"] and told["samples"] == 18 and told["missing"]["mean"] == 0.5
    assert told["missing"]["metric"] == "half"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "yours.check:build"], "no module 'yours' here"),
        (["--model", "mine.other:build"], "no module 'mine.other' here"),
        (["--model", "mine.check:make"], "module 'mine.check' has no function 'make'"),
        (["--model", "mine.check:number"], "module 'mine.check' has no function 'number'"),
        (["--metric", "mine.check:forgets"], "mine.check:forgets returned None"),
        (["--features", "a=c"], r"modules\['a'\] must be names of modules, got 'c'"),
        (["--data", "mine.check:once"], "readable twice"),
        (["--html", "nowhere/page.html"], "nowhere/page.html cannot be written: there is no folder nowhere"),
        (["--plot", "nowhere/plot.png"], "nowhere/plot.png cannot be written: there is no folder nowhere"),
        (["--html", "mine"], "mine is a folder, not a file"),
    ],
)
def test_command_fails_with_a_message(project, arguments, message, capsys):
    assert cli.main([*GIVEN, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(f"^modreg-fast audit: .*{message}", printed.err) and "Traceback" not in printed.err


def test_command_shows_where_the_users_own_code_failed(project):
    with pytest.raises(ValueError, match="the file is gone"):
        cli.main([*GIVEN[:3], *GIVEN[3:], "--model", "mine.check:broken"])
    with pytest.raises(ModuleNotFoundError, match="nothing_like_this"):
        cli.main([*GIVEN, "--data", "mine.needs:loader"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (GIVEN[:3], "required: --data"),
        ([*GIVEN, "--model", "mine.check"], "expected MODULE:NAME, such as project.models:build, got 'mine.check'"),
        ([*GIVEN, "--model", "mine:a.b"], "expected MODULE:NAME"),
        ([*GIVEN, "--features", "rgb"], "expected MODALITY=MODULE"),
        ([*GIVEN, "--features", "rgb=a,,b"], "expected MODALITY=MODULE"),
        ([*GIVEN, "--plot", "plot.jpgg"], "expected a name that ends in .eps, "),
        ([*GIVEN, "--baseline", "median"], "invalid choice"),
        (["audit", "--help"], None),
    ],
)
def test_command_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    printed = capsys.readouterr()
    if message is None:
        assert stop.value.code == 0 and "examples:" in printed.out and "def loader():" in printed.out
    else:
        assert stop.value.code == 2 and message in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "a=a", "--features", "a=b", "--features", "b=b"], "--features a= is given twice"),
        (["--html", "a.png", "--plot", "a.png"], "--html and --plot are both a.png"),
    ],
)
def test_arguments_that_do_not_fit_each_other(project, arguments, message, capsys):
    assert cli.main([*GIVEN, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err


def test_what_cannot_be_written_is_said_before_the_work(project, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["modreg_fast.audit.measure"], "audit", lambda *args, **options: pytest.fail("it measured"))
    assert cli.main([*GIVEN, "--html", "nowhere/page.html"]) == 1
    assert cli.main([*GIVEN, "--baseline", "mean", "--plot", "nowhere/plot"]) == 1
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda *args, **options: (_ for _ in ()).throw(RuntimeError("no latex"))
    )
    with pytest.raises(RuntimeError, match="no latex"):
        cli.main([*GIVEN, "--plot", "plot.pgf"])


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_a_terminal_without_our_signs(project, monkeypatch, capsys, encoding):
    """All is printed, and what was given is told from what was not."""
    (project / "mine" / "check.py").write_text(MODULE.replace('"a"', '"α"').replace("self.a", "self.alpha"))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main([*GIVEN, "--html", "page.html"]) == 0 and capsys.readouterr().err == ""
    terminal.flush()
    text = terminal.buffer.getvalue().decode(encoding)
    empty = "·" if encoding != "ascii" else "."
    assert [line.split()[:2] for line in text.splitlines() if line.split()[:1] in (["x"], [empty])] == [
        ["x", "x"],
        ["x", empty],
        [empty, "x"],
    ]
    assert "\\u03b1" in text and "+-" in text.replace("±", "+-") and "α" in (project / "page.html").read_text(encoding="utf-8")
    monkeypatch.syspath_prepend(project)
    check = importlib.import_module("mine.check")
    print(mrf.audit(check.build(), check.loader(), progress=False).table())
    terminal.flush()


def test_stdout_that_takes_nothing(project):
    """The reader of a pipe has left, or a full disk: the files are written all the same."""
    command = [sys.executable, "-m", "modreg_fast.cli", *GIVEN, "--html", "page.html", "--metric", "mine.check:metric"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr == "" and (project / "page.html").exists()
    if os.path.exists("/dev/full"):
        (project / "page.html").unlink()
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True)
        assert done.returncode in (1, 120) and "modreg-fast audit: [Errno 28]" in done.stderr and (project / "page.html").exists()


def test_a_file_that_fails_does_not_cost_the_others(project, capsys, monkeypatch):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(Audit, "to_html", fail)
    assert cli.main([*GIVEN, "--html", "page.html", "--plot", "plot"]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("a carries ") and printed.err == "modreg-fast audit: the disk is full\n"
    assert (project / "plot.png").read_bytes().startswith(b"\x89PNG") and not (project / "page.html").exists()
