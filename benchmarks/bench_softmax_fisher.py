"""``softmax_fisher`` by every provider, on the shapes of real models."""

import pytest

from modreg_fast.bench.cases import MODES, select

CASES = [(case, provider) for case in select() if case.op == "softmax_fisher" for provider in case.providers]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "provider"), CASES, ids=str)
def test_softmax_fisher(time_pass, case, provider, mode):
    time_pass(case, provider, mode)
