"""``every``: the penalty every k-th step, k times as strong, and the model's own forward in between."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from tests.helpers.vits import (
    VITS,
    Calls,
    assert_same,
    diverse_vit,
    full,
    gradients,
    images_for,
    labels_for,
    step,
    timm_vit,
)


@pytest.fixture(params=VITS.values(), ids=VITS.keys())
def model(request):
    return request.param()


class TestEvery:
    @pytest.mark.parametrize("layers", ["last", "all"])
    def test_the_penalty_every_kth_step_times_k(self, model, layers):
        images = images_for(model, 4)
        expect = full(model, images, layers=layers)
        expect_grads = gradients(model, 3 * expect)
        diversity = dvf.HeadDiversity(model, layers=layers, every=3)
        for n in range(7):
            logits, penalty = step(model, diversity, images)
            assert diversity.step == n + 1
            if n % 3 == 0:
                torch.testing.assert_close(penalty, 3 * expect, rtol=1e-12, atol=0)
                assert_same(gradients(model, penalty), expect_grads)
            else:
                assert penalty.item() == 0
                assert not penalty.requires_grad
                assert (penalty.dtype, penalty.shape) == (logits.dtype, ())

    def test_the_zero_joins_a_loss(self, model):
        images = images_for(model, 4)
        plain = gradients(model, F.cross_entropy(model(images), labels_for(images)))
        diversity = dvf.HeadDiversity(model, every=2)
        diversity.step = 1
        logits, penalty = step(model, diversity, images)
        loss = F.cross_entropy(logits, labels_for(images)) + 100 * penalty
        for ours, theirs in zip(gradients(model, loss), plain, strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_the_zero_has_the_penalty_s_dtype(self, dtype):
        diversity = dvf.HeadDiversity(diverse_vit(), every=2)
        diversity.step = 1
        with diversity:
            pass
        logits = torch.ones(2, 3, dtype=dtype, requires_grad=True)
        assert diversity.penalty(logits).dtype == torch.promote_types(dtype, torch.float32)

    def test_a_left_out_block_is_the_model_s_own_forward(self):
        model = timm_vit()
        images = images_for(model, 4)
        classes = [type(m) for m in model.modules()]
        diversity = dvf.HeadDiversity(model, layers="all", every=2)
        seen = []
        for _ in range(2):
            with Calls() as calls, diversity:
                inside = [type(m) for m in model.modules()]
                logits = model(images)
                modes = len(_get_current_function_mode_stack())
            seen.append((inside == classes, modes, calls.stock, calls.ours))
            diversity.penalty(logits)
        # wrt="input" captures the projection below the first attention, so all three are ours
        assert seen == [(False, 2, [], [4, 4, 4]), (True, 1, [4, 4, 4], [])]
        assert torch.equal(logits, model(images))

    def test_nothing_is_captured_in_between(self):
        model = diverse_vit()
        diversity = dvf.HeadDiversity(model, every=2)
        diversity.step = 1
        with diversity:
            model(images_for(model, 4))
        assert diversity._recording.runs == []

    def test_what_counts_as_a_step(self):
        model = diverse_vit()
        images = images_for(model, 4)
        diversity = dvf.HeadDiversity(model, every=2)
        with torch.no_grad(), diversity:
            model(images)
        assert diversity.step == 0
        model.eval()  # of no consequence
        first = step(model, diversity, images)[1]
        with torch.no_grad(), diversity:  # validation in between does not move the schedule
            model(images)
        second, third = (step(model, diversity, images)[1] for _ in range(2))
        assert (first > 0, second == 0, third > 0) == (True, True, True)
        assert diversity.step == 3

    def test_asking_moves_nothing(self):
        model = diverse_vit()
        images = images_for(model, 4)
        diversity = dvf.HeadDiversity(model, every=2)
        _, first = step(model, diversity, images)
        cosines = diversity.cosines
        logits, zero = step(model, diversity, images)
        assert all(diversity.penalty(logits) == zero == 0 for _ in range(3))
        assert diversity.cosines is cosines
        assert step(model, diversity, images)[1] == first
        assert diversity.step == 3

    def test_the_zero_is_not_for_free(self):
        """Wrong arguments raise in left-out steps and before the first step too."""
        model = diverse_vit()
        images = images_for(model, 4)
        logits = model(images)
        diversity = dvf.HeadDiversity(model, every=2)
        diversity.step = 1
        with pytest.raises(UsageError, match="logits computed under this context"):
            diversity.penalty(logits)
        with diversity, pytest.raises(UsageError, match="enter it once"), diversity:
            pass
        for bad in (logits.detach(), logits[0], None):
            with pytest.raises(UsageError, match="logits: expected"):
                diversity.penalty(bad)
        with torch.no_grad(), diversity:  # the last block was not a left-out step
            model(images)
        with pytest.raises(UsageError, match="logits computed under this context"):
            diversity.penalty(logits)

    @pytest.mark.parametrize("every", [0, -1, 2.0, True, "2", None], ids=repr)
    def test_bad_values_are_one_line(self, every):
        with pytest.raises(UsageError, match=r"^every: expected a whole number of at least 1"):
            dvf.HeadDiversity(diverse_vit(), every=every)
