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
        ({"weight": 100.0}, "weight: expected a function of no arguments or None, got 100.0"),
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
    @pytest.mark.parametrize(
        "fails_in",
        [1, 2, 3, 4, 7],
        ids=["watched", "warm-up", "rehearsal", "capture", "later capture"],
    )
    @pytest.mark.parametrize("fresh", [True, False])
    @pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt("mine")], ids=repr)
    def test_an_error_of_the_loss(self, optimizer, fails_in, fresh, error):
        if fails_in > 4 and not fresh:
            pytest.skip("without new state there is one capture")
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
                    raise error
                return own(logits)

            training.diversity.penalty = penalty
            training.step = dvf.graph_step(
                training.loss, training.optimizer, diversity=training.diversity
            )
            before = training.state()
            with pytest.raises(type(error), match="mine"):
                training.step(*batch())
            assert_same(training.state(), before, rtol=0, atol=0)
            run(training, 2)
        exact = {"rtol": 0, "atol": 0} if optimizer is sgd else {"rtol": 1e-3, "atol": 2e-5}
        assert_same(training.state(), plain.state(), **exact)

    def test_an_error_after_the_step_that_makes_the_optimizers_state(self):
        """While the graph is captured that uses this state: the step is taken back with it."""
        with stand_in_graphs():
            model, calls = nn.Linear(3, 2), []

            def loss(x):
                calls.append(1)
                if len(calls) == 5:
                    raise KeyError("mine")
                return model(x).square().sum()

            optimizer = sgd(model.parameters())
            step = dvf.graph_step(loss, optimizer)
            with pytest.raises(KeyError, match="mine"):
                step(torch.ones(1, 3))
            assert (step.graphs, len(optimizer.state)) == (0, 0)
            step(torch.ones(1, 3))
            before = optimizer.state[model.weight]["momentum_buffer"].clone()
            step(torch.ones(1, 3))
            assert not torch.equal(optimizer.state[model.weight]["momentum_buffer"], before)

    def test_a_module_that_replaces_its_buffer(self):
        """The plain step reads what the last one made, a replay what the capture found."""

        class Centred(nn.Linear):
            def __init__(self):
                super().__init__(3, 2)
                self.register_buffer("mean", torch.zeros(3))

            def forward(self, x):
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
                return super().forward(x - self.mean)

        model = Centred()
        mean = model.mean
        with stand_in_graphs():
            step = dvf.graph_step(lambda x: model(x).sum(), sgd(model.parameters()))
            with pytest.raises(UnsupportedError, match=r"^model: Centred replaces its 'mean'"):
                step(torch.ones(1, 3))
        assert model.mean is mean
        assert torch.equal(mean, torch.zeros(3))

    def test_a_module_that_fills_its_buffer_once(self):
        class Cached(nn.Linear):
            def __init__(self):
                super().__init__(3, 2)
                self.register_buffer("mask", None)

            def forward(self, x):
                if self.mask is None:
                    self.mask = torch.ones(3)
                return super().forward(x * self.mask)

        model = Cached()
        with stand_in_graphs():
            step = dvf.graph_step(lambda x: model(x).sum(), sgd(model.parameters()))
            mask = [step(torch.ones(1, 3)) and model.mask for _ in range(3)]
            assert step.graphs == 1
        assert mask[0] is mask[1] is mask[2]

    @pytest.mark.parametrize("kind", [int, torch.tensor], ids=["number", "tensor"])
    def test_an_optimizer_that_counts_in_its_options(self, kind):
        class Decaying(torch.optim.Optimizer):
            def __init__(self, parameters):
                super().__init__(parameters, {"lr": 0.1})

            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    group.setdefault("steps", kind(0))
                    group["steps"] += 1
                    for p in group["params"]:
                        p.add_(p.grad, alpha=-group["lr"] / float(group["steps"]))

        model = nn.Linear(3, 2)
        optimizer = Decaying(model.parameters())
        step = dvf.graph_step(lambda x: model(x).sum(), optimizer)
        for steps in (1, 2):
            with stand_in_graphs():
                captured = dvf.graph_step(lambda x: model(x).sum(), optimizer)
                with pytest.raises(UnsupportedError, match=r"^optimizer: Decaying changes its opt"):
                    captured(torch.ones(1, 3))
            step(torch.ones(1, 3))
            assert optimizer.param_groups[0]["steps"] == steps  # and no more

    def test_an_optimizer_that_waits(self):
        """It is named, though its lines are those of somebody else."""

        class Waiting(torch.optim.SGD):
            def step(self, closure=None):
                return self.checked()

            def checked(self):
                assert all(p.sum().item() for group in self.param_groups for p in group["params"])

        model = nn.Linear(3, 2)
        with stand_in_graphs():
            step = dvf.graph_step(lambda x: model(x).sum(), Waiting(model.parameters()))
            with pytest.raises(UnsupportedError, match=r"^optimizer: Waiting waits for the GPU"):
                step(torch.ones(1, 3))

    def test_a_loop_without_gradients(self):
        """A plain step fails there, so a replay does not run."""
        with stand_in_graphs():
            training = Training(sgd)
            run(training, 1)
            with pytest.raises(UsageError, match="a tensor with a graph"), torch.no_grad():
                training.step(*batch())

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
