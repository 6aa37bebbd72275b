"""``modreg-fast``: help with examples, exit codes, JSON. More of ``demo``, ``audit`` and ``bench`` stands in their own files."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import modreg_fast as mrf
from modreg_fast import cli, parity

COMMANDS = ["info", "demo", "audit", "bench", "parity"]


def told(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out)


def test_info(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and status.detail in printed for name, status in mrf.backends().items())
    assert cli.main(["info", "--json"]) == 0
    found = told(capsys)
    assert found["torch"] == torch.__version__ and found["modreg_fast"] == mrf.__version__
    assert found["backends"] == {name: status._asdict() for name, status in mrf.backends().items()}


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_examples_that_parse(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    lines = re.findall(r"^  (modreg-fast .*?)(?:  .*)?$", re.sub(r" *\\\n +", " ", examples), re.MULTILINE)
    assert stop.value.code == 0 and len(lines) >= 2
    for line in lines:
        _, *arguments = shlex.split(re.split(" [|>] ", line)[0])
        if "--help" not in arguments:
            cli._parser().parse_args(arguments)


def test_without_arguments_it_says_what_to_do_next(capsys: pytest.CaptureFixture) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "usable here: " in out and "reference" in out
    for command in re.findall(r"modreg-fast (\w+)", out):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "invalid choice"),
        (["info", "--jsn"], "unrecognized arguments"),
        (["demo", "--seeds", "0"], "at least 1"),
        (["demo", "--seeds", "x"], "at least 1"),
        (["audit"], "required: --model, --data"),
        (["bench", "--threads", "two"], "invalid int value"),
        (["parity", "--backend"], "expected one argument"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_parity(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["parity", "--quick", "--json", "--backend", "reference"]) == 0
    found = told(capsys)
    assert found["backend"] == "reference" and found["passed"] and len(found["results"]) >= 8
    assert {row["op"] for row in found["results"]} == set(parity.OPS)
    assert cli.main(["parity", "--quick", "--backend", "reference"]) == 0
    assert "within what is allowed" in capsys.readouterr().out


def test_parity_of_a_wrong_backend(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error above what is allowed, or NaN, fails; so does a backend that is not there."""
    good = parity.check
    for wrong in (1e-3, float("nan")):

        def check(problem, backend, device, wrong=wrong):
            return (
                replace(good(problem, backend, device), gradients=wrong)
                if problem.op == "softmax_fisher"
                else good(problem, backend, device)
            )

        monkeypatch.setattr(parity, "check", check)
        assert cli.main(["parity", "--quick", "--json", "--backend", "reference"]) == 1
        found = told(capsys)
        assert not found["passed"] and {row["passed"] for row in found["results"]} == {True, False}
    for name in ("cpo", "cuda"):
        if name not in mrf.backends() or not mrf.backends()[name].available:
            assert cli.main(["parity", "--backend", name]) == 2
            assert f"'{name}'" in capsys.readouterr().err


def test_interrupted(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(options: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", stop)
    assert cli.main(["info"]) == 130 and "interrupted" in capsys.readouterr().err


def test_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "modreg_fast.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"modreg_fast {mrf.__version__}\n"
