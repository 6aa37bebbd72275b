"""``gradient_statistics`` by every provider, on the shapes of real models."""

import pytest

from modreg_fast.bench.cases import MODES, select

CASES = [(case, provider) for case in select() if case.op == "gradient_statistics" for provider in case.providers]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "provider"), CASES, ids=str)
def test_gradient_statistics(time_pass, case, provider, mode):
    time_pass(case, provider, mode)
