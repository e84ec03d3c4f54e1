"""Times of training steps, loss and backward: the paper's setting, a penalty on every layer of a ViT, R1 of critics."""

import pytest

from benchmarks.cases import critic_cases, step_cases


@pytest.mark.parametrize("case", step_cases("paper step"), ids=lambda case: case.id)
def test_paper_step(measure, case):
    measure(case)


@pytest.mark.parametrize("case", step_cases("all-layers step"), ids=lambda case: case.id)
def test_all_layers_step(measure, case):
    pytest.importorskip("timm")
    measure(case)


@pytest.mark.parametrize("case", critic_cases(), ids=lambda case: case.id)
def test_r1_step(measure, case):
    if case.spec.critic == "ViT-S":
        pytest.importorskip("timm")
    measure(case)
