"""``modreg-fast audit``: the user's model and data by name, exit codes, messages."""

import json
import re
import sys

import pytest
from auditing import Page

from modreg_fast import cli

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
        (["--features", "a=c"], r"modules\['a'\] must be names of modules, got 'c'"),
        (["--data", "mine.check:once"], "readable twice"),
        (["--html", "nowhere/page.html"], "nowhere/page.html"),
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
