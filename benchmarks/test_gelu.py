"""GELU: value, gradients, gradients of gradients."""

import pytest

from benchmarks.cases import operator_cases


@pytest.mark.parametrize("case", operator_cases("gelu"), ids=lambda case: case.id)
def test_gelu(measure, case):
    measure(case)
