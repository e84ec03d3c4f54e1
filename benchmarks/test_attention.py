"""Times of attention: forward, backward and double backward; by tokens and dtype."""

import pytest

from benchmarks.cases import LONG_TOKENS, TOKENS, anchor_cases, issue_cases, operator_cases

ROWS = [*operator_cases("attention", TOKENS), *anchor_cases("attention")]
LONG = operator_cases("attention", LONG_TOKENS)


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_attention(measure, case):
    measure(case)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.id)
def test_long_attention(measure, case):
    measure(case)


@pytest.mark.parametrize("case", issue_cases(), ids=lambda case: case.id)
def test_gradient_penalty_of_the_public_issue(measure, case):
    measure(case)
