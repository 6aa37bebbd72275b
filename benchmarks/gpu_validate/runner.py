"""Runs steps, each in a process of its own, one after the other; whatever happens to one, the rest goes on."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOG = 4000  # characters kept of what a step printed


@dataclass(frozen=True)
class Step:
    """``command`` gets the path of a JSON file as its last argument and writes its findings there: ``summary``, ``failures`` (a list,
    empty when all is well), ``tables`` (title to a list of rows, each a dict), and ``absent``, true where what it needs is missing."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # all of it
    seconds: float = 1800.0  # after which it is stopped


@dataclass(frozen=True)
class Outcome:
    """``status``: passed, failed (it found what is wrong), crashed (it did not come to an end), absent (it could not be tried)."""

    name: str
    status: str
    seconds: float
    summary: str
    failures: list[str]
    tables: dict[str, list[dict[str, Any]]]
    log: str


def run(steps: Sequence[Step]) -> list[Outcome]:
    outcomes = []
    for step in steps:
        outcomes.append(_run(step))
        print(f"{outcomes[-1].status:<8} {step.name:<22} {outcomes[-1].seconds:6.1f} s  {outcomes[-1].summary}", flush=True)
        for failure in outcomes[-1].failures:
            print(f"         {failure}", flush=True)
    return outcomes


def passed(outcomes: Sequence[Outcome]) -> bool:
    return all(outcome.status in ("passed", "absent") for outcome in outcomes)


def _run(step: Step) -> Outcome:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        findings = Path(folder, "findings.json")
        try:
            done = subprocess.run(
                [*step.command, str(findings)],
                capture_output=True,
                text=True,
                errors="replace",
                env=step.environment,
                timeout=step.seconds,
            )
            log, end = done.stdout + done.stderr, f"ended with exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            log, end = str(error), f"was stopped after {step.seconds:.0f} seconds"
        seconds = time.perf_counter() - start
        try:
            found = json.loads(findings.read_text())
        except (OSError, ValueError):
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")
            return Outcome(step.name, "crashed", seconds, end, [last], {}, log[-_LOG:])
    status = "absent" if found["absent"] else "failed" if found["failures"] else "passed"
    return Outcome(step.name, status, seconds, found["summary"], found["failures"], found["tables"], log[-_LOG:])


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", *arguments]
