"""Bad input of ``graph_step``: one-line errors, and everything as it was before."""

import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from tests.helpers.stand_in_graphs import stand_in_graphs
from tests.training.test_graph_step import Training, assert_same, batch, fused_adam, run, sgd


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"diversity": 1}, "diversity: expected a HeadDiversity or None, got int"),
        ({"amp": torch.int8}, "amp: expected torch.bfloat16, torch.float16 or None"),
        ({"clip": 0}, "clip: expected a positive number or None, got 0"),
        ({"scaler": 2.0}, "scaler: expected a torch.amp.GradScaler or None, got float"),
        ({"accumulate": 0}, "accumulate: expected a whole number of at least 1, got 0"),
        ({"max_graphs": True}, "max_graphs: expected a whole number of at least 1, got True"),
        ({"optimizer": "adam"}, "optimizer: expected a torch.optim.Optimizer, got str"),
        ({"loss": None}, "loss: expected a function, got NoneType"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments(options, said):
    weight = nn.Parameter(torch.ones(1))
    given = {"loss": weight.sum, "optimizer": torch.optim.SGD([weight])} | options
    with pytest.raises(UsageError, match=f"^{said}"):
        dvf.graph_step(given.pop("loss"), given.pop("optimizer"), **given)


@pytest.mark.parametrize("result", [torch.ones(2), 1.0, (torch.ones(()), 0.5)], ids=repr)
def test_wrong_results(result):
    step = dvf.graph_step(lambda: result, torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    with pytest.raises(UsageError, match=r"^loss: expected a scalar tensor"):
        step()


class TestNothingChanges:
    """A step that fails while it is captured leaves all as it was, and the next one works."""

    @pytest.mark.parametrize("optimizer", [sgd, fused_adam])
    @pytest.mark.parametrize("fails_in", [1, 2, 3], ids=["warm-up", "rehearsal", "capture"])
    @pytest.mark.parametrize("fresh", [True, False])
    def test_an_error_of_the_loss(self, optimizer, fails_in, fresh):
        plain = Training(optimizer, dropout=0.5)
        if not fresh:
            run(plain, 1)
        run(plain, 2)
        with stand_in_graphs():
            training = Training(optimizer, dropout=0.5)
            if not fresh:
                run(training, 1)
            own, calls = training.diversity.penalty, []

            def penalty(logits):
                calls.append(1)
                if len(calls) == fails_in:
                    raise KeyError("mine")
                return own(logits)

            training.diversity.penalty = penalty
            training.step = dvf.graph_step(
                training.loss, training.optimizer, diversity=training.diversity
            )
            before = training.state()
            with pytest.raises(KeyError, match="mine"):
                training.step(*batch())
            assert_same(training.state(), before, rtol=0, atol=0)
            run(training, 2)
        exact = {"rtol": 0, "atol": 0} if optimizer is sgd else {"rtol": 1e-3, "atol": 2e-5}
        assert_same(training.state(), plain.state(), **exact)

    def test_a_loss_that_waits(self):
        with stand_in_graphs():
            training = Training(sgd)
            step = dvf.graph_step(
                lambda x, y: training.loss(x, y)[0] * x.sum().item(),
                training.optimizer,
                diversity=training.diversity,
            )
            before = training.state()
            with pytest.raises(UnsupportedError, match=r"^loss: .* waits for the GPU") as e:
                step(*batch())
            assert "\n" not in str(e.value)
            assert_same(training.state(), before, rtol=0, atol=0)


def test_ddp_cannot_be_captured():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        dvf.graph_step(lambda x: model(x).sum(), optimizer)(torch.ones(1, 2))  # plainly it is right
        with stand_in_graphs():
            step = dvf.graph_step(lambda x: model(x).sum(), optimizer)
            with pytest.raises(UnsupportedError, match=r"^model: a CUDA graph of a step under DDP"):
                step(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
