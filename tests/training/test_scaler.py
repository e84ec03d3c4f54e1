"""``graph_step`` with a ``GradScaler``, and the factor on the prediction that float16 needs, kept on the device."""

import pytest
import torch

from diversevit_fast.errors import UnsupportedError
from tests.helpers.stand_in_graphs import stand_in_graphs
from tests.training.test_graph_step import Training, assert_same, run


def fused_sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=True)


def trained(before, **options):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    training = Training(fused_sgd, step={"scaler": scaler, "clip": 1.0, **options})
    run(training, 6, before=before)
    scales = {"scale": torch.tensor(scaler.get_scale())}
    return training.state() | scales, training.diversity._scale.state()


def overflow(training, i):
    """The loss of the fourth step is infinite."""
    training.weight.fill_(torch.inf if i == 3 else 100.0)


@pytest.mark.parametrize("before", [lambda training, i: None, overflow], ids=["finite", "overflow"])
@pytest.mark.parametrize("amp", [None, torch.float16], ids=str)
def test_like_plain_steps(before, amp):
    """Also the scale, which grows every second step and halves where a step is left out."""
    plain, factor = trained(before, amp=amp)
    with stand_in_graphs():
        replayed, moved = trained(before, amp=amp)
    assert_same(replayed, plain, rtol=1e-3, atol=1e-4)
    assert plain["scale"] != 2.0**10
    assert moved == factor


def test_the_factor_is_halved_on_the_device():
    """Where the heads' gradients overflow, the step is left out and the next one has half the factor."""
    with stand_in_graphs():
        scaler = torch.amp.GradScaler("cpu")
        training = Training(fused_sgd, step={"scaler": scaler, "amp": torch.float16})
        run(training, 2)
        scale = training.diversity._scale
        assert scale.state()[1] == 2
        factor, good = scale._moved
        factor.fill_(2.0**30)  # beyond float16
        weights = [p.clone() for p in training.model.parameters()]
        run(training, 1)
        assert (factor.item(), good.item()) == (2.0**29, 0)
        assert all(map(torch.equal, training.model.parameters(), weights))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("checked", [False, True])
def test_a_fixed_factor_that_overflows_in_a_replay(scaled, checked):
    """The next step says so, whether or not the scaler left that step out, and ``check`` does."""
    with stand_in_graphs():
        step = {"amp": torch.float16} | ({"scaler": torch.amp.GradScaler("cpu")} if scaled else {})
        training = Training(fused_sgd, step=step, grad_scale=2.0**12)
        run(training, 2)
        training.diversity.check()
        with torch.no_grad():
            training.model.vit.head.weight.mul_(300)
        (value, logits), *_ = run(training, 1)
        assert logits.isfinite().all()
        assert value.isnan()
        said = r"^float16: the gradients of the heads overflowed with grad_scale 4096 in an earlier"
        with pytest.raises(UnsupportedError, match=said) as error:
            training.diversity.check() if checked else run(training, 1)
        assert "\n" not in str(error.value)
        training.diversity.check()  # it is said once
