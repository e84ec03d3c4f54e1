"""Times of LayerNorm: forward, backward and double backward."""

import pytest

from benchmarks.cases import operator_cases


@pytest.mark.parametrize("case", operator_cases("layer_norm"), ids=lambda case: case.id)
def test_layer_norm(measure, case):
    measure(case)
