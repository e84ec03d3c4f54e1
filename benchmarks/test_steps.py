"""Times of training steps with the penalty, loss and backward: the paper's setting, and every layer of a ViT."""

import pytest

from benchmarks.cases import step_cases


@pytest.mark.parametrize("case", step_cases("paper step"), ids=lambda case: case.id)
def test_paper_step(measure, case):
    measure(case)


@pytest.mark.parametrize("case", step_cases("all-layers step"), ids=lambda case: case.id)
def test_all_layers_step(measure, case):
    pytest.importorskip("timm")
    measure(case)
