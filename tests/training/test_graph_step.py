"""``graph_step``: the step itself, and that replays of it do what a loop of plain steps does."""

import copy
import random
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_fast.models import DiverseViT
from tests.helpers.stand_in_graphs import stand_in_graphs

SIZES = {"dim": 16, "depth": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 16, "image_size": (16, 8)}


class Normed(nn.Module):
    """A DiverseViT of images that a BatchNorm saw, with dropout: a model with buffers and random numbers."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.vit = DiverseViT(**SIZES)
        self.dropout = nn.Dropout(dropout)
        self.scaled = nn.Sequential(nn.Identity())
        self.register_buffer("one", torch.ones(1).expand(3, 1, 1))

    def forward(self, x):
        return self.vit(self.scaled(self.dropout(self.norm(x))) * self.one)


def batch(size=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(size, 3, 16, 8, generator=g), torch.arange(size) % 2


class Training:
    """A model, its penalty, optimizer and step, all from the same seed."""

    def __init__(self, optimizer, *, step=None, dropout=0.0, **options):
        torch.manual_seed(0)
        random.seed(0)
        self.model = Normed(dropout)
        options.setdefault("check_finite", False)  # which looks at once on a CPU
        self.diversity = dvf.HeadDiversity(self.model, **options)
        self.optimizer = optimizer(self.model.parameters())
        self.weight = torch.tensor(100.0)
        self.step = dvf.graph_step(
            self.loss, self.optimizer, diversity=self.diversity, **(step or {})
        )

    def loss(self, images, labels):
        with self.diversity:
            logits = self.model(images)
        return F.cross_entropy(logits, labels) + self.weight * self.diversity.penalty(
            logits
        ), logits

    def state(self):
        """Everything that a step changes."""
        values = {f"model.{k}": v.clone() for k, v in self.model.state_dict().items()}
        for i, p in enumerate(self.model.parameters()):
            for name, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    values[f"optimizer.{i}.{name}"] = value.clone()
        own = self.diversity._split.generator
        return values | {
            "draws": torch.get_rng_state() if own is None else own.get_state(),
            "step": torch.tensor(self.diversity.step),
        }


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        try:
            torch.testing.assert_close(mine, theirs[name], **tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3)


def fused_adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, dampening=0.5)


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=1e-3)


def run(training, steps=6, sizes=(4,), before=lambda training, i: None):
    values = []
    for i in range(steps):
        before(training, i)
        values.append(training.step(*batch(sizes[i % len(sizes)], i)))
    return values


def compare(make, exact=True, **how):
    """Run the same training plainly and by replays; return the recorder."""
    plain = make()
    wanted = run(plain, **how)
    with stand_in_graphs() as recorder:
        replayed = make()
        results = run(replayed, **how)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 2e-5}
    assert_same(replayed.state(), plain.state(), **tolerance)
    for ours, theirs in zip(results, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    return recorder


class TestPlainly:
    def test_the_step_is_the_loop_one_would_write(self):
        """On a CPU: the same bits as zero_grad, forward, backward, clip, step."""
        ours, theirs = Training(adam, step={"clip": 1.0}), Training(adam)
        for i in range(3):
            value, logits = ours.step(*batch(seed=i))
            theirs.optimizer.zero_grad()
            loss, wanted = theirs.loss(*batch(seed=i))
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.model.parameters(), 1.0)
            theirs.optimizer.step()
            assert torch.equal(value, loss.detach())
            assert torch.equal(logits, wanted.detach())
            assert not logits.requires_grad
        assert_same(ours.state(), theirs.state(), rtol=0, atol=0)
        assert ours.step.graphs == 0
        assert all(p.grad is None for p in ours.model.parameters())

    @pytest.mark.parametrize("replayed", [False, True])
    def test_parts_of_a_batch_add_up(self, replayed):
        """``accumulate``: the gradient of the mean, for a loss that is a mean and a model without BatchNorm."""
        steps = []
        with stand_in_graphs() if replayed else nullcontext():
            for accumulate in (1, 2):
                torch.manual_seed(0)
                model = nn.Linear(3, 2)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                step = dvf.graph_step(
                    lambda x, model=model: (model(x).square().mean(), model(x)),
                    optimizer,
                    accumulate=accumulate,
                )
                x = torch.arange(12.0).reshape(4, 3)
                steps += [(step(x), step(x), model.weight)]
            (whole, _, weight), (parts, _, other) = steps
            torch.testing.assert_close(parts[0], whole[0])
            assert [x.shape for x in parts[1]] == [(2, 2), (2, 2)]
            torch.testing.assert_close(torch.cat(parts[1]), whole[1])
            torch.testing.assert_close(other, weight)
            with pytest.raises(UsageError, match=r"^accumulate: expected batches of one size"):
                step(x[:3])

    def test_amp_casts(self):
        model = nn.Linear(3, 2)
        seen = []

        def loss(x):
            seen.append(model(x).dtype)
            return model(x).float().sum()

        step = dvf.graph_step(loss, torch.optim.SGD(model.parameters()), amp=torch.bfloat16)
        with torch.autocast("cpu", torch.float16):
            step(torch.rand(1, 3))
        dvf.graph_step(loss, torch.optim.SGD(model.parameters()))(torch.rand(1, 3))
        assert seen == [torch.bfloat16, torch.float32]


class TestReplays:
    """Against the same steps run plainly, from everything the same."""

    @pytest.mark.parametrize("optimizer", [sgd, fused_adam, adam, rmsprop])
    @pytest.mark.parametrize(
        "options",
        [{}, {"layers": "all"}, {"every": 3}, {"fraction": 0.5}],
        ids=str,
    )
    def test_like_plain_steps(self, optimizer, options):
        """Also the first step, whose optimizer state does not exist yet; captured Adam rounds otherwise."""

        def make():
            own = {"generator": torch.Generator().manual_seed(5)} if "fraction" in options else {}
            return Training(optimizer, step={"clip": 1.0}, **options, **own)

        recorder = compare(make, exact=optimizer is sgd)
        assert len(recorder.graphs) == (2 if "every" in options else 1)

    def test_dropout_draws_anew(self):
        def make():
            return Training(sgd, dropout=0.5)

        compare(make)

    @pytest.mark.parametrize("optimizer", [sgd, fused_adam, adam])
    def test_a_schedule_of_learning_rates(self, optimizer):
        def warm_up(training, i):
            for group in training.optimizer.param_groups:
                group["lr"] = 2e-4 * (1 + 2 * (i // 2))

        recorder = compare(lambda: Training(optimizer), exact=optimizer is sgd, before=warm_up)
        assert len(recorder.graphs) == (3 if optimizer is sgd else 1)

    def test_another_option_of_the_optimizer_is_another_graph(self):
        def decay(training, i):
            training.optimizer.param_groups[0]["weight_decay"] = 0.1 * (i > 2)

        assert len(compare(lambda: Training(sgd), before=decay).graphs) == 2

    def test_a_changing_weight(self):
        compare(lambda: Training(sgd), before=lambda t, i: t.weight.fill_(10.0 * i))

    def test_batches_of_several_sizes(self):
        recorder = compare(lambda: Training(sgd), sizes=(4, 4, 2))
        assert len(recorder.graphs) == 2

    def test_evaluation_mode_in_between(self):
        def switch(training, i):
            training.model.train(i % 2 == 0)

        recorder = compare(lambda: Training(sgd, dropout=0.5), before=switch)
        assert len(recorder.graphs) == 2

    def test_freezing_in_between(self):
        def freeze(training, i):
            training.model.vit.blocks[0].requires_grad_(i < 2)

        recorder = compare(lambda: Training(sgd), before=freeze)
        assert len(recorder.graphs) == 2

    def test_gradients_cleared_by_the_user(self):
        compare(lambda: Training(sgd), before=lambda t, i: t.optimizer.zero_grad(i % 2 == 0))

    def test_gradients_that_the_user_leaves(self):
        """A step clears them, also where nothing of it runs in Python."""

        def take_another(training, i):
            training.loss(*batch(seed=9))[0].backward()
            training.optimizer.step()

        compare(lambda: Training(sgd), before=take_another)

    def test_gradients_of_others(self):
        """Parameters that the optimizer does not hold get none from a graph, which would hold their addresses."""
        with stand_in_graphs():
            model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
            model[0].weight.grad = torch.ones(3, 3)
            step = dvf.graph_step(
                lambda x: model(x).square().sum(),
                torch.optim.SGD([{"params": []}, {"params": model[1].parameters()}], lr=0.1),
            )
            for _ in range(3):
                step(torch.rand(4, 3))
            assert torch.equal(model[0].weight.grad, torch.ones(3, 3))
            assert model[0].bias.grad is None

    def test_arguments_with_names_and_dictionaries(self):
        def steps():
            torch.manual_seed(0)
            model = nn.Linear(3, 2)
            step = dvf.graph_step(
                lambda inputs, *, target: F.cross_entropy(model(inputs["x"]), target["y"][0]),
                torch.optim.SGD(model.parameters(), lr=0.1),
                accumulate=2,
            )
            x, y = torch.rand(4, 3), torch.arange(4) % 2
            return torch.stack([step({"x": x}, target={"y": [y]}) for _ in range(3)]), step.graphs

        wanted, _ = steps()
        with stand_in_graphs():
            values, graphs = steps()
        assert torch.equal(values, wanted)
        assert graphs == 1

    def test_a_loss_that_writes_into_its_batch(self):
        def make():
            training = Training(sgd)
            own = training.loss
            training.step = dvf.graph_step(
                lambda x, y: own(x.mul_(0.5).add_(1), y),
                training.optimizer,
                diversity=training.diversity,
            )
            return training

        compare(make)

    def test_a_default_dtype(self):
        """The learning rate of a graph is a float32."""
        model = nn.Linear(1, 1, bias=False)
        with stand_in_graphs():
            optimizer = torch.optim.AdamW(model.parameters(), lr=1.2345e-3, weight_decay=0)
            try:
                torch.set_default_dtype(torch.bfloat16)
                step = dvf.graph_step(lambda x: model(x).sum(), optimizer)
                before = model.weight.item()
                step(torch.ones(1, 1, dtype=torch.float32))
                moved = before - model.weight.item()
            finally:
                torch.set_default_dtype(torch.float32)
        assert moved == pytest.approx(1.2345e-3, rel=1e-4)

    def test_results_are_not_overwritten(self):
        with stand_in_graphs():
            training = Training(sgd)
            (_, first), (_, second) = run(training, 2)
            assert not torch.equal(first, second)
            before = first.clone()
            run(training, 2)
            assert torch.equal(first, before)

    def test_cosines_are_those_of_the_last_penalty(self):
        plain = Training(sgd, every=2)
        run(plain, 4)
        with stand_in_graphs():
            training = Training(sgd, every=2)
            run(training, 4)
        assert torch.equal(training.diversity.cosines[0], plain.diversity.cosines[0])

    def test_warm_up_leaves_no_trace(self, monkeypatch):
        """After a capture, and before the first replay, all is as it was: bit for bit."""
        training = Training(sgd, dropout=0.5)
        run(training, 2)  # the optimizer has state now
        with stand_in_graphs():
            step = dvf.graph_step(training.loss, training.optimizer, diversity=training.diversity)
            monkeypatch.setattr(type(step), "_replay", lambda self, graph, leaves: None)
            before = training.state() | {"random": torch.tensor(random.getstate()[1])}
            step(*batch())
            assert step.graphs == 1
        after = training.state() | {"random": torch.tensor(random.getstate()[1])}
        assert_same(after, before, rtol=0, atol=0)

    def test_two_steps_on_one_model(self):
        def alternate(cm):
            with cm:
                training = Training(sgd)
                other = torch.optim.SGD(training.model.vit.blocks[0].parameters(), lr=0.1)
                second = dvf.graph_step(lambda x, y: F.cross_entropy(training.model(x), y), other)
                for i in range(4):
                    training.step(*batch(seed=i))
                    second(*batch(seed=i))
                return training.state()

        assert_same(alternate(stand_in_graphs()), alternate(nullcontext()), rtol=0, atol=0)


class TestNoticed:
    """What a graph does not see is noticed before a replay, and captured again."""

    @pytest.mark.parametrize(
        "what",
        [
            *("parameter", "module", "data", "optimizer", "group", "state", "state of one"),
            *("entry of a state", "options of the penalty", "added module"),
        ],
    )
    def test_what_was_replaced(self, what):
        def replace(training, i):
            if i != 3:
                return
            norm = training.model.norm
            if what == "parameter":
                norm.weight = nn.Parameter(torch.full((3,), 2.0))
                training.optimizer.param_groups[0]["params"][0] = norm.weight
            elif what == "module":
                training.model.norm = nn.BatchNorm2d(3, momentum=0.5)
            elif what == "data":
                norm.weight.data = torch.full((3,), 2.0)
            elif what == "optimizer":
                training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
            elif what == "state":
                training.optimizer.state.clear()
            elif what == "state of one":
                training.optimizer.state[norm.weight] = {"momentum_buffer": torch.ones(3)}
            elif what == "entry of a state":
                training.optimizer.state[norm.weight]["momentum_buffer"] = torch.ones(3)
            elif what == "options of the penalty":
                training.diversity.every = 3
            elif what == "added module":
                training.model.scaled.append(nn.Tanh())
            else:
                training.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})

        graphs = 3 if what == "options of the penalty" else 2
        assert len(compare(lambda: Training(sgd), before=replace).graphs) == graphs

    @pytest.mark.parametrize("what", ["heads", "backend"])
    def test_contexts_around_a_step(self, what):
        """Inside one that changes what the model computes, the step is another."""

        def run_in_context(training):
            step, heads = training.step, dvf.keep_heads(training.model, {-1: [0]})

            def alternate(*batch):
                inside = heads if what == "heads" else dvf.use_backend("reference")
                with inside if training.diversity.step % 4 > 1 else nullcontext():
                    return step(*batch)

            training.step = alternate
            run(training, 8)
            return training.state()

        wanted = run_in_context(Training(sgd))
        with stand_in_graphs() as recorder:
            assert_same(run_in_context(Training(sgd)), wanted, rtol=0, atol=0)
        assert len(recorder.graphs) == (4 if what == "heads" else 2)  # replaced, or kept apart

    def test_too_many_graphs_are_said_once(self):
        with stand_in_graphs():
            training = Training(sgd, step={"max_graphs": 2})
            with pytest.warns(
                UserWarning, match=r"^graph_step: more than 2 kinds of steps"
            ) as said:
                run(training, 5, sizes=(2, 3, 4, 5, 6))
            assert len(said) == 1
            assert training.step.graphs == 2
