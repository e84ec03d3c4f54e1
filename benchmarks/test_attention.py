"""Times of attention: forward, backward and double backward; by tokens and dtype."""

import pytest

from benchmarks.cases import LONG_TOKENS, TOKENS, operator_cases

ROWS = operator_cases("attention", TOKENS)
LONG = operator_cases("attention", LONG_TOKENS)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_attention(measure, case):
    measure(case)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.id)
def test_long_attention(measure, case):
    measure(case)
