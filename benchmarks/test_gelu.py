"""Times of GELU: forward, backward and double backward."""

import pytest

from benchmarks.cases import operator_cases


@pytest.mark.parametrize("case", operator_cases("gelu"), ids=lambda case: case.id)
def test_gelu(measure, case):
    measure(case)
