"""``modality_cross_entropy`` by every provider, on the shapes of real predictions."""

import pytest

from modreg_fast.bench.cases import MODES, select

CASES = [(case, provider) for case in select() if case.op == "modality_cross_entropy" for provider in case.providers]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "provider"), CASES, ids=str)
def test_modality_cross_entropy(time_pass, case, provider, mode):
    time_pass(case, provider, mode)
