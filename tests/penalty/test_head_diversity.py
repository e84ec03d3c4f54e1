"""HeadDiversity equals the published penalty and leaves the model as it was."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.models import DiverseViT
from tests.helpers.published import published_penalty
from tests.helpers.vits import attentions, diverse_vit, images_for, labels_for, timm_vit


class Multiplying(nn.Module):
    """Attention that calls no attention."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.mT).softmax(-1) @ v)


MODELS = {
    "diverse-vit": diverse_vit,
    "diverse-vit-residual": lambda: diverse_vit(last_residual=True),
    "timm": timm_vit,
    "timm-average": lambda: timm_vit(global_pool="avg", class_token=False),
    "timm-qk-norm": lambda: timm_vit(qk_norm=True),
    "timm-layerscale": lambda: timm_vit(init_values=0.1),
    "timm-registers": lambda: timm_vit(reg_tokens=2),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return request.param()


def parameter_gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def regularised(model, images, **options):
    diversity = dvf.HeadDiversity(model, **options)
    with diversity:
        logits = model(images)
    return logits, diversity.penalty(logits), diversity


@pytest.mark.parametrize("wrt", ["input", "output"])
def test_equals_the_published_loop(model, wrt):
    """Value and every parameter's gradient, through the last layer (with its few-query path)."""
    images = images_for(model)
    logits, penalty, _ = regularised(model, images, wrt=wrt)
    expect_logits, expect = published_penalty(model, images, attentions(model)[-1], wrt)
    torch.testing.assert_close(logits, expect_logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(penalty, expect, rtol=1e-9, atol=1e-12)
    ours = parameter_gradients(model, F.cross_entropy(logits, labels_for(logits)) + 100 * penalty)
    theirs = parameter_gradients(
        model, F.cross_entropy(expect_logits, labels_for(logits)) + 100 * expect
    )
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        torch.testing.assert_close(a.expand_as(b), b, rtol=1e-7, atol=1e-10, msg=name)


def test_the_penalty_changes_the_gradient(model):
    """The comparison above can fail: without the penalty the gradients are far away."""
    images = images_for(model)
    logits, penalty, _ = regularised(model, images)
    with_penalty = parameter_gradients(model, logits.square().sum() + 100 * penalty)
    logits, _, _ = regularised(model, images)
    without = parameter_gradients(model, logits.square().sum())
    name = [n for n, _ in model.named_parameters()].index(
        next(n for n, p in model.named_parameters() if p is attentions(model)[-1].qkv.weight)
    )
    assert (with_penalty[name] - without[name]).abs().max() > 1e-4


@pytest.mark.parametrize("layers", ["all", [0, -2]])
@pytest.mark.parametrize("wrt", ["input", "output"])
def test_several_layers_are_the_mean(model, layers, wrt):
    images = images_for(model)
    _, penalty, diversity = regularised(model, images, layers=layers, wrt=wrt)
    chosen = range(3) if layers == "all" else (0, 1)
    each = [published_penalty(model, images, attentions(model)[i], wrt)[1] for i in chosen]
    expect = sum(each) / len(each)
    torch.testing.assert_close(penalty, expect, rtol=1e-9, atol=1e-12)
    assert len(diversity.cosines) == len(diversity.num_heads) == len(each)
    ours, theirs = (parameter_gradients(model, x) for x in (penalty, expect))
    for a, b in zip(ours, theirs, strict=True):
        if b is not None and b.abs().max() > 1e-12:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_float32_is_within_the_published_tolerance():
    model = DiverseViT()
    images = torch.rand(4, 3, 64, 32)
    _, penalty, _ = regularised(model, images)
    _, expect = published_penalty(model, images, model.blocks[-1].attn)
    torch.testing.assert_close(penalty, expect, rtol=1e-5, atol=1e-8)
    ours, theirs = (parameter_gradients(model, x) for x in (penalty, expect))
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-9


@pytest.mark.parametrize("options", [{"granularity": "sample"}, {"reduction": "pairs"}], ids=str)
def test_granularity_and_reduction(options):
    model = diverse_vit()
    images = images_for(model)
    with dvf.capture_heads(model, layers="last") as heads:
        logits = model(images)
    (g,) = torch.autograd.grad(logits.max(-1).values.sum(), heads[0])
    _, penalty, diversity = regularised(model, images, wrt="output", **options)
    torch.testing.assert_close(penalty.detach(), dvf.head_penalty(g, **options))
    assert diversity.cosines[0].shape[-2:] == (4, 4)


@pytest.mark.parametrize(
    "target", ["probability", lambda logits: logits[:, 1]], ids=["word", "function"]
)
def test_other_targets(target):
    model = diverse_vit()
    images = images_for(model)
    with dvf.capture_heads(model, layers="last") as heads:
        logits = model(images)
    score = logits.softmax(-1).max(-1).values if target == "probability" else target(logits)
    (g,) = torch.autograd.grad(score.sum(), heads[0])
    _, penalty, _ = regularised(model, images, wrt="output", target=target)
    torch.testing.assert_close(penalty.detach(), dvf.head_penalty(g))


class TestNothingIsLeftBehind:
    def test_classes_state_and_results(self, model):
        images = images_for(model)
        before = model(images)
        classes = [type(m) for m in model.modules()]
        keys = list(model.state_dict())
        diversity = dvf.HeadDiversity(model, layers="all")
        with diversity:
            assert isinstance(model, classes[0])
            assert list(model.state_dict()) == keys
            model(images)
        assert [type(m) for m in model.modules()] == classes
        assert all(
            not isinstance(v, torch.Tensor) for m in model.modules() for v in vars(m).values()
        )
        torch.testing.assert_close(model(images), before, rtol=0, atol=0)

    def test_after_an_exception(self, model):
        classes = [type(m) for m in model.modules()]
        with pytest.raises(KeyError), dvf.HeadDiversity(model, layers="all"):
            raise KeyError
        assert [type(m) for m in model.modules()] == classes

    @pytest.mark.parametrize(
        "copied",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
        ids=["deepcopy", "pickle"],
    )
    def test_copies_made_inside_are_plain_and_independent(self, model, copied):
        images = images_for(model)
        with dvf.HeadDiversity(model, layers="all") as diversity:
            logits = model(images)
            clone = copied(model)
        assert [type(m) for m in clone.modules()] == [type(m) for m in model.modules()]
        with torch.no_grad():
            for p in clone.parameters():
                p.zero_()
        assert not torch.allclose(clone(images), logits)
        assert diversity.penalty(logits) > 0

    def test_one_object_serves_many_steps(self, model):
        images, diversity = images_for(model), dvf.HeadDiversity(model)
        values = []
        for _ in range(3):
            with diversity:
                logits = model(images)
            values.append(diversity.penalty(logits).item())
        assert values[0] == values[1] == values[2]


def test_batches_are_checked_before_the_gradient(monkeypatch):
    """The gradient is expensive, and the error needs none of it."""

    def no_gradient(*args, **options):
        raise AssertionError("a gradient was taken")

    model = diverse_vit()
    diversity = dvf.HeadDiversity(model)
    monkeypatch.setattr("diversevit_fast.penalty.head_diversity.head_gradients", no_gradient)
    for count, error, words in (
        (2, UsageError, "a row for each of the 3 samples"),
        (3, AssertionError, "a gradient was taken"),
    ):
        with diversity:
            logits = model(images_for(model))
        with pytest.raises(error, match=words):
            diversity.penalty(logits[:count])


def test_training_loop_lowers_the_penalty():
    model = diverse_vit().float()
    images = images_for(model, 16).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    diversity = dvf.HeadDiversity(model, layers="all")
    values = []
    for _ in range(30):
        with diversity:
            logits = model(images)
        penalty = diversity.penalty(logits)
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels_for(logits)) + 100 * penalty).backward()
        optimizer.step()
        values.append(penalty.item())
    assert values[-1] < 0.5 * values[0]


class TestWaysOfAsking:
    """Every route to the penalty's gradient gives the same numbers, or raises."""

    def expected(self, model, images):
        logits, penalty, _ = regularised(model, images)
        return parameter_gradients(model, logits.sum() + 100 * penalty)  # a linear tail

    def test_backward_and_backward_inputs(self, model):
        images = images_for(model)
        expect = self.expected(model, images)
        for inputs in (None, list(model.parameters())):
            model.zero_grad()
            logits, penalty, _ = regularised(model, images)
            loss = logits.sum() + 100 * penalty
            loss.backward() if inputs is None else loss.backward(inputs=inputs)
            for p, want in zip(model.parameters(), expect, strict=True):
                if want is not None:
                    torch.testing.assert_close(p.grad, want)

    def test_frozen_trunk(self):
        model = diverse_vit()
        images = images_for(model)
        expect = self.expected(model, images)
        for p in model.parameters():
            p.requires_grad_(False)
        model.head.requires_grad_()
        logits, penalty, _ = regularised(model, images)
        ours = torch.autograd.grad(logits.sum() + 100 * penalty, model.head.weight)[0]
        index = [n for n, _ in model.named_parameters()].index("head.weight")
        torch.testing.assert_close(ours, expect[index])

    def test_checkpointed_blocks_are_right(self):
        model = diverse_vit()
        images = images_for(model)
        expect = self.expected(model, images)
        for block in model.blocks:
            plain = block.forward
            block.forward = functools.partial(checkpoint, plain, use_reentrant=False)
        for ours, want in zip(self.expected(model, images), expect, strict=True):
            if want is not None:
                torch.testing.assert_close(ours, want)

    def test_compiled_models_are_refused(self):
        model = diverse_vit()
        with pytest.raises(UnsupportedError, match="compiled"):
            dvf.HeadDiversity(torch.compile(model))
        inside = diverse_vit()
        inside.blocks[-1].mlp.compile()
        with pytest.raises(UnsupportedError, match="compiled"):
            dvf.HeadDiversity(inside)
        below = diverse_vit()
        below.blocks[0].compile(backend="aot_eager")
        images = images_for(below)
        logits, penalty, _ = regularised(below, images)
        ours = parameter_gradients(below, logits.sum() + 100 * penalty)
        for a, b in zip(ours, self.expected(diverse_vit(), images), strict=True):
            torch.testing.assert_close(a, b)

    def test_autocast_is_close(self):
        model = diverse_vit().float()
        images = images_for(model).float()
        _, exact, _ = regularised(model, images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, penalty, _ = regularised(model, images)
        (logits.float().sum() + 100 * penalty).backward()
        assert penalty.dtype == torch.float32
        torch.testing.assert_close(penalty, exact, rtol=0.1, atol=1e-3)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())

    def test_nested_with_keep_heads(self):
        model = diverse_vit()
        images = images_for(model)
        diversity = dvf.HeadDiversity(model)
        with dvf.keep_heads(model, {-1: [0, 2]}), diversity:
            logits = model(images)
        penalty = diversity.penalty(logits)
        pruned = dvf.prune_heads(copy.deepcopy(model), {-1: [0, 2]})
        torch.testing.assert_close(logits, pruned(images))
        kept = diversity.cosines[0][..., [0, 2], :][..., [0, 2]]
        assert penalty > 0
        assert kept[..., 0, 1].abs().max() > 0
        assert not diversity.cosines[0][..., 1, :].any()


class TestHeadPenalty:
    @pytest.mark.parametrize("wrt", ["input", "output"])
    def test_equals_head_diversity(self, wrt):
        model = diverse_vit()
        images = images_for(model)
        _, expect, _ = regularised(model, images, wrt=wrt)
        logits = model(images)
        penalty = dvf.nn.HeadPenalty(wrt=wrt)(logits.max(-1).values, model.blocks[-1].attn)
        torch.testing.assert_close(penalty, expect)
        ours, theirs = (parameter_gradients(model, x) for x in (penalty, expect))
        for a, b in zip(ours, theirs, strict=True):
            if b is not None and b.abs().max() > 1e-12:
                torch.testing.assert_close(a, b)

    def test_only_for_the_last_forward(self):
        model = diverse_vit()
        images = images_for(model)
        penalty, attention = dvf.nn.HeadPenalty(), model.blocks[-1].attn
        with pytest.raises(UsageError, match="attention: expected a forward"):
            penalty(torch.ones(3, requires_grad=True), attention)
        stale = model(images).max(-1).values
        _fresh = model(images)
        with pytest.raises(UsageError, match="score: expected a score computed from the last"):
            penalty(stale, attention)
        with pytest.raises(UsageError, match="score"):
            penalty(stale.detach(), attention)

    def test_a_copy_knows_nothing_of_the_original(self):
        model = diverse_vit()
        score = model(images_for(model)).max(-1).values
        with pytest.raises(UsageError, match="attention"):
            dvf.nn.HeadPenalty()(score, copy.deepcopy(model).blocks[-1].attn)


BAD = {
    "no attention": (lambda: dvf.HeadDiversity(nn.Linear(2, 2)), "model: expected a model with"),
    "not a module": (lambda: dvf.HeadDiversity("vit"), "model: expected a torch.nn.Module"),
    "layer word": (lambda: dvf.HeadDiversity(diverse_vit(), layers="first"), "layers: expected"),
    "layer index": (lambda: dvf.HeadDiversity(diverse_vit(), layers=[3]), "layers: expected layer"),
    "layer twice": (
        lambda: dvf.HeadDiversity(diverse_vit(), layers=[2, -1]),
        "layers: expected each",
    ),
    "no layer": (lambda: dvf.HeadDiversity(diverse_vit(), layers=[]), "layers: expected"),
    "wrt": (lambda: dvf.HeadDiversity(diverse_vit(), wrt="weights"), "wrt: expected one of"),
    "granularity": (lambda: dvf.HeadDiversity(diverse_vit(), granularity="x"), "granularity: "),
    "reduction": (lambda: dvf.HeadDiversity(diverse_vit(), reduction="x"), "reduction: expected"),
    "target": (lambda: dvf.HeadDiversity(diverse_vit(), target="loss"), "target: expected"),
    "one head": (
        lambda: dvf.HeadDiversity(diverse_vit(num_heads=1), reduction="pairs"),
        "reduction: expected",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line(name):
    make, message = BAD[name]
    with pytest.raises(UsageError) as failure:
        make()
    assert str(failure.value).startswith(message), failure.value
    assert "\n" not in str(failure.value)


class TestBadLogits:
    def fails(self, logits, match, diversity):
        with pytest.raises(UsageError, match=match) as failure:
            diversity.penalty(logits)
        assert "\n" not in str(failure.value)

    def test_all(self):
        model = diverse_vit()
        images = images_for(model)
        diversity = dvf.HeadDiversity(model)
        outside = model(images)
        self.fails(outside, "logits: expected logits computed under this context", diversity)
        with diversity:
            logits = model(images)
        self.fails(outside, "logits computed under this context", diversity)
        with diversity:
            logits = model(images)
        self.fails(logits.detach(), "logits: expected a tensor with a graph", diversity)
        self.fails(logits * torch.nan, "logits: expected finite values", diversity)
        self.fails(logits[0], r"logits: expected floating \[B, classes\]", diversity)
        diversity.penalty(logits)
        self.fails(logits, "logits computed under this context", diversity)
        with diversity, torch.no_grad():
            logits = model(images)
        self.fails(logits, "logits: expected a tensor with a graph", diversity)
        with diversity, torch.inference_mode():
            logits = model(images)
        self.fails(logits, "logits: expected a tensor with a graph", diversity)

    def test_target_of_the_wrong_shape(self):
        model = diverse_vit()
        diversity = dvf.HeadDiversity(model, target=lambda logits: logits.sum())
        with diversity:
            logits = model(images_for(model))
        self.fails(logits, r"target: expected a callable returning \[3\]", diversity)

    def test_attention_that_calls_no_kernel(self):
        """A module that computes attention by itself is refused; timm's can use either way."""
        model = timm_vit()
        images = images_for(model)
        expect = regularised(model, images)[1]
        for attention in attentions(model):
            attention.fused_attn = False
        torch.testing.assert_close(regularised(model, images)[1], expect)
        assert not model.blocks[-1].attn.fused_attn
        model.blocks[-1].attn.__class__ = Multiplying
        for context in (dvf.HeadDiversity(model), dvf.keep_heads(model, {-1: [0]})):
            with pytest.raises(UnsupportedError, match=r"blocks.2.attn .* without F.sc"), context:
                model(images)

    def test_entered_twice(self):
        diversity = dvf.HeadDiversity(diverse_vit())
        with diversity, pytest.raises(UsageError, match="enter it once"), diversity:
            pass

    def test_attention_dropout(self):
        model = timm_vit(attn_drop_rate=0.5).train()
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            with dvf.HeadDiversity(model) as diversity:
                logits = model(images_for(model))
                penalty = diversity.penalty(logits)
            found.append(torch.autograd.grad(penalty, model.blocks[0].attn.qkv.weight)[0])
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


def test_whole_model_compiles_in_one_graph():
    """Recording the last run for HeadPenalty must not break the graph."""
    torch._dynamo.reset()
    model = diverse_vit()
    images = images_for(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
