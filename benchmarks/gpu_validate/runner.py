"""Runs steps, each in a process of its own: side by side, and then, one after the other, those that must be alone. Whatever happens to
one, the rest goes on."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOG = 4000  # characters kept of what a step printed
_TOGETHER = 0.55  # share of the time that the steps side by side may take


@dataclass(frozen=True)
class Step:
    """``command`` gets the path of a JSON file as its last argument and writes its findings there: ``summary``, ``failures`` (a list,
    empty when all is well), ``tables`` (title to a list of rows, each a dict), and ``absent``, true where what it needs is missing. In
    its environment, ``GPU_VALIDATE_SECONDS`` says how long it has."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # all of it
    seconds: float = 1800.0  # after which it is stopped
    alone: bool = False  # on the machine
    group: str = ""  # of which one runs at a time


@dataclass(frozen=True)
class Outcome:
    """``status``: passed, failed (it found what is wrong), crashed (it did not come to an end), absent (it could not be tried), left out
    (the time for all was over)."""

    name: str
    status: str
    seconds: float
    summary: str
    failures: list[str]
    tables: dict[str, list[dict[str, Any]]]
    log: str


def run(
    steps: Sequence[Step],
    workers: int = 1,
    minutes: float | None = None,
    written: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """``minutes``: for all, None without a limit. ``written`` gets the outcomes so far, in the order of the steps, after each."""
    start, outcomes = time.monotonic(), dict[str, Outcome]()
    groups: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def one(step: Step) -> Outcome:
        until = None if minutes is None else start + 60 * minutes * (1 if step.alone else _TOGETHER)
        if not step.group:
            return _run(step, until)
        with groups[step.group]:
            return _run(step, until)

    def done(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        print(f"{outcome.status:<8} {outcome.name:<22} {outcome.seconds:6.1f} s  {outcome.summary}", flush=True)
        for failure in outcome.failures:
            print(f"         {failure}", flush=True)
        written([outcomes[step.name] for step in steps if step.name in outcomes])

    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(one, step) for step in steps if not step.alone]):
            done(future.result())
    for step in steps:
        if step.alone:
            done(one(step))
    return [outcomes[step.name] for step in steps]


def passed(outcomes: Sequence[Outcome]) -> bool:
    return all(outcome.status in ("passed", "absent", "left out") for outcome in outcomes)


def _run(step: Step, until: float | None) -> Outcome:
    start = time.monotonic()
    seconds = step.seconds if until is None else min(step.seconds, until - start)
    if seconds < 1:
        return Outcome(step.name, "left out", 0.0, "there was no time left for it", [], {}, "")
    with tempfile.TemporaryDirectory() as folder:
        findings, ended = Path(folder, "findings.json"), "crashed"
        try:
            done = subprocess.run(
                [*step.command, str(findings)],
                capture_output=True,
                text=True,
                errors="replace",
                env={**step.environment, "GPU_VALIDATE_SECONDS": f"{seconds:.1f}"},
                timeout=seconds,
            )
            log, end = done.stdout + done.stderr, f"ended with exit code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            log, end = str(error), f"was stopped after {seconds:.0f} seconds"
            if seconds < step.seconds:
                ended = "left out"
        taken = time.monotonic() - start
        try:
            found = json.loads(findings.read_text())
        except (OSError, ValueError):
            last = next((line for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")
            return Outcome(step.name, ended, taken, end, [last] if ended == "crashed" else [], {}, log[-_LOG:])
    status = "absent" if found["absent"] else "failed" if found["failures"] else "passed"
    return Outcome(step.name, status, taken, found["summary"], found["failures"], found["tables"], log[-_LOG:])


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", *arguments]
