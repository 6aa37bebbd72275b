"""``pytest benchmarks/ --benchmark-only``: the default set of ``modreg-fast bench`` under pytest-benchmark, grouped by case and mode."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from modreg_fast.bench.cases import Case
from modreg_fast.bench.providers import build, make_inputs, make_upstream

TimePass = Callable[[Case, str, str], None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")  # torch's own, when torch.compile starts


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """``bench_*.py`` in this folder; a file named on the command line is collected anyway."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture
def time_pass(benchmark: BenchmarkFixture) -> TimePass:
    """Times one mode of a provider on a case, with fresh gradients in every call."""

    def run(case: Case, provider: str, mode: str) -> None:
        benchmark.group = f"{case}, {mode}"
        leaves, upstream, function = make_inputs(case), make_upstream(case), build(provider, case)

        def forward() -> None:
            with torch.no_grad():
                function(leaves)

        def graph() -> list[Tensor]:
            for x in leaves:
                x.grad = None
            return function(leaves)

        def backward(outputs: list[Tensor]) -> None:
            torch.autograd.backward(outputs, upstream)

        if mode == "forward":
            benchmark(forward)
        elif mode == "backward":
            benchmark.pedantic(backward, setup=lambda: ((graph(),), {}), rounds=10, warmup_rounds=1)
        else:
            benchmark(lambda: backward(graph()))

    return run
