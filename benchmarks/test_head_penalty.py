"""Times of the penalty on head gradients and the routed one: forward, backward and double backward."""

import pytest

from benchmarks.cases import operator_cases


@pytest.mark.parametrize("case", operator_cases("head_penalty"), ids=lambda case: case.id)
def test_head_penalty(measure, case):
    measure(case)


@pytest.mark.parametrize("case", operator_cases("routed_head_penalty"), ids=lambda case: case.id)
def test_routed_head_penalty(measure, case):
    measure(case)
