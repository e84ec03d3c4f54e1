"""Times of LayerNorm: forward, backward and double backward."""

import pytest

from benchmarks.cases import anchor_cases, operator_cases

ROWS = [*operator_cases("layer_norm"), *anchor_cases("layer_norm")]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_layer_norm(measure, case):
    measure(case)
