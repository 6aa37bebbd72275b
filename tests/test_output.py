"""Results on their way out: files whole or not at all, JSON for strict readers, text for any terminal; Ctrl-C leaves nothing behind."""

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modreg_fast import _output

ROOT = Path(__file__).parents[1]


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "result.txt"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), _output.whole(path) as part:
            part.write_text("half")
            raise error
        assert list(tmp_path.iterdir()) == []
    _output.write(path, "one")
    with pytest.raises(ValueError), _output.whole(path) as part:
        part.write_text("half")
        assert path.read_text() == "one"
        raise ValueError
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    _output.write(path, "zwölf")
    assert path.read_bytes() == "zwölf".encode() and list(tmp_path.iterdir()) == [path]


def test_modes_links_and_devices(tmp_path):
    """A new file is as open() makes it, an old one keeps its mode, a link stays a link, and a device is written to."""
    path, link = tmp_path / "result.txt", tmp_path / "link"
    _output.write(path, "one")
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    path.chmod(0o640)
    link.symlink_to(path)
    _output.write(link, "two")
    assert link.is_symlink() and path.read_text() == "two" and stat.S_IMODE(path.stat().st_mode) == 0o640
    _output.writable("/dev/null")
    _output.write("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_checks_before_the_work(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "no" / "a", FileNotFoundError),
        (tmp_path / "file" / "a", OSError),
    ):
        with pytest.raises(error, match=str(tmp_path)):
            _output.writable(path)
    with pytest.raises(OSError, match="file"):
        _output.folder(tmp_path / "file")
    _output.writable(tmp_path / "file")
    _output.folder(tmp_path / "a" / "b")
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "a" / "b").iterdir())
    if os.geteuid():
        (tmp_path / "file").chmod(0o400)
        with pytest.raises(PermissionError, match="file cannot be written"):
            _output.writable(tmp_path / "file")


def test_json_has_no_nan():
    x = {"a": [1.0, float("nan"), (float("inf"), None)], "b": {"c": -float("inf"), "d": True, "e": 3}}
    text = _output.to_json(x)
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.0, None, [None, None]], "b": {"c": None, "d": True, "e": 3}}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_terminal(encoding, monkeypatch):
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert _output.printable("● · ±").encode(encoding)
    with _output.any_terminal():
        print("● · ± 深", end="", flush=True)
    assert stream.errors == "strict"
    expected = {"ascii": "x . +- \\u6df1", "utf-8": "● · ± 深"}.get(encoding, "x · ± \\u6df1")
    assert file.getvalue().decode(encoding) == expected


def test_a_step_that_fails_does_not_keep_the_others_from_it(capsys):
    done = []

    def fail():
        raise OSError("no space")

    assert _output.deliver("us", lambda: done.append(1), fail, lambda: done.append(2)) == 1
    assert done == [1, 2] and capsys.readouterr().err == "us: no space\n"
    assert _output.deliver("us", lambda: done.append(3)) == 0


AUDIT = """
import time, torch

def build():
    return lambda x: x["a"] + x["b"]

class Slow(list):
    def __iter__(self):
        print("ready", flush=True)
        for batch in super().__iter__():
            time.sleep(0.2)
            yield batch

def loader():
    x = {m: torch.randn(2, 3) for m in "ab"}
    return Slow([(x, torch.tensor([0, 1]))] * 1000)
"""

COMMANDS = {
    "audit": [
        "-m",
        "modreg_fast.cli",
        "audit",
        "--model",
        "check:build",
        "--data",
        "check:loader",
        "--html",
        "a.html",
        "--plot",
        "a.png",
    ],
    "demo": ["-m", "modreg_fast.cli", "demo", "--seeds", "50", "--output", "out"],
    "bench": ["-m", "modreg_fast.cli", "bench", "--output", "out"],
    "study": ["-m", "benchmarks.study", "--output", "out", "--workers", "2"],
}


def members(group: int) -> list[int]:
    """The processes of a process group, those that have ended left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                _, _, rest = (entry / "stat").read_text().rpartition(")")
            except OSError:
                continue
            state, _, pgrp = rest.split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c(command, tmp_path):
    """To the whole group, as a terminal does: exit code 130, no process left, no file but whole ones."""
    pytest.importorskip("rich")
    (tmp_path / "check.py").write_text(AUDIT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, *COMMANDS[command]],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if command == "audit":
            assert process.stdout.readline() == "ready\n"
            time.sleep(1)
        else:
            deadline = time.monotonic() + 120
            while not (tmp_path / "out").exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            time.sleep(15)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in err, err
        for _ in range(50):
            if not members(process.pid):
                break
            time.sleep(0.2)
        assert members(process.pid) == []
        files = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        assert files <= {"check.py", "runs.csv"}
        for path in tmp_path.rglob("runs.csv"):
            assert path.read_text().endswith("\n")
    finally:
        for left in members(process.pid):
            os.kill(left, signal.SIGKILL)
