"""Logits that are not finite are refused: of a CPU at once, of a GPU by a later step, and never lost in between."""

import copy
import math

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_fast.penalty import finite_logits
from diversevit_fast.penalty.finite_logits import FiniteLogits
from tests.helpers.vits import diverse_vit, images_for

EARLIER = "logits: expected finite values, got NaN or infinity in an earlier step"


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors are looked at as a GPU's. What was copied to the host arrives when ``arrive`` is called."""
    copies = []

    class Host:
        def __init__(self):
            self.value = torch.zeros(())

        def item(self):
            return self.value.item()

        def copy_(self, x, non_blocking=False):
            copies.append((self, x.clone()))
            if not non_blocking:
                arrive()

    def arrive():
        for host, value in copies:
            host.value = value
        copies.clear()

    def nothing_seen(device, dtype, refusal):
        return finite_logits._Largest(torch.zeros((), dtype=dtype), Host(), refusal)

    monkeypatch.setattr(finite_logits, "_runs_apart", lambda x: True)
    monkeypatch.setattr(finite_logits, "_nothing_seen", nothing_seen)
    return arrive


def step(diversity, images):
    with diversity:
        logits = diversity.model(images)
    return diversity.penalty(logits)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_cpu_refuses_at_once(value):
    logits = torch.zeros(3, 2)
    logits[1, 1] = value
    with pytest.raises(UsageError, match="logits: expected finite values, got NaN or infinity;"):
        FiniteLogits().note(logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gpu_reports_when_the_copy_arrived(gpu, value, dtype):
    logits, finite = torch.zeros(3, 2, dtype=dtype), FiniteLogits()
    finite.note(logits)
    finite.note(logits.index_fill(0, torch.tensor([1]), value))
    finite.note(logits)  # does not hide the step before
    finite.look()
    gpu()
    with pytest.raises(UsageError, match=EARLIER):
        finite.look()
    finite.look()  # said once
    finite.wait()
    gpu()
    finite.look()


def test_the_largest_finite_numbers_are_finite(gpu):
    finite = FiniteLogits()
    for dtype in (torch.float16, torch.float32, torch.float64):
        finite.note(torch.full((100, 7), -torch.finfo(dtype).max, dtype=dtype))
    finite.note(torch.zeros(0, 7))
    finite.wait()


def test_the_last_step_is_not_lost(gpu):
    finite = FiniteLogits()
    finite.note(torch.full((2, 2), math.nan))
    finite.look()
    with pytest.raises(UsageError, match=EARLIER):
        finite.wait()
    gpu()
    finite.look()


@pytest.mark.parametrize("kind", ["entry", "entry without gradients", "check"])
def test_of_a_step(gpu, kind):
    model = diverse_vit()
    images = images_for(model)
    diversity = dvf.HeadDiversity(model, every=2)
    step(diversity, images)
    diversity.check()
    with diversity:
        logits = model(images)
    diversity.penalty(logits)  # left out by ``every``: not looked at
    with diversity:
        logits = model(images)
    diversity.penalty(logits * math.nan)
    gpu()
    counted = diversity.step
    report = diversity.check if kind == "check" else diversity.__enter__
    with (
        torch.set_grad_enabled(kind != "entry without gradients"),
        pytest.raises(UsageError, match=EARLIER),
    ):
        report()
    assert diversity.step == counted
    assert all("_plain_class" not in vars(type(m)) for m in model.modules())
    step(diversity, images)


def test_nothing_waits(gpu, monkeypatch):
    """No value of the device is read by a step."""
    monkeypatch.setattr(FiniteLogits, "wait", None)
    monkeypatch.setattr(FiniteLogits, "_report", None)
    diversity = dvf.HeadDiversity(diverse_vit(), layers="all")
    for _ in range(3):
        step(diversity, images_for(diversity.model))
        gpu()


def test_a_copy_knows_nothing_of_the_originals_steps(gpu):
    diversity = dvf.HeadDiversity(diverse_vit())
    diversity._finite.note(torch.full((2, 2), math.nan))
    clone = copy.deepcopy(diversity)
    clone.check()
    with pytest.raises(UsageError, match=EARLIER):
        diversity.check()


def test_it_can_be_left_out():
    model = diverse_vit()
    diversity = dvf.HeadDiversity(model, check_finite=False)
    with diversity:
        logits = model(images_for(model))
    assert diversity.penalty(logits * math.nan).isnan()
    diversity.check()
