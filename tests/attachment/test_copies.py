"""Copies and pickles of this library's contexts observe the model copied with them, or are refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_fast.heads.prefix_cache import PrefixCache
from tests.helpers.versions import compiles_losses
from tests.helpers.vits import diverse_vit, images_for, labels_for, timm_vit


class Learner(nn.Module):
    """A module as in Lightning: it holds the model and the context that observes it."""

    def __init__(self, model: nn.Module, **options):
        super().__init__()
        self.model = model
        self.diversity = dvf.HeadDiversity(model, **options)

    def forward(self, images, labels):
        with self.diversity:
            logits = self.model(images)
        return F.cross_entropy(logits, labels) + 10 * self.diversity.penalty(logits)


def saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": saved_and_loaded,
    "averaged": lambda x: AveragedModel(x).module,
}
MODELS = {"diverse-vit": diverse_vit, "timm": timm_vit}
OPTIONS = {
    "last": {},
    "all": {"layers": "all", "wrt": "output"},
    "every": {"every": 2},
    "fraction": {"fraction": 0.5, "layers": "all"},
}


@pytest.fixture(params=COPIES.values(), ids=COPIES)
def copied(request):
    return request.param


def step(learner, images, labels):
    """The loss and every gradient."""
    learner.zero_grad()
    torch.manual_seed(0)
    loss = learner(images, labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in learner.parameters())]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_copied_learner_watches_the_copied_model(copied, model, options, used):
    learner = Learner(model(), **options)
    images, labels = images_for(learner.model), labels_for(images_for(learner.model))
    if used:
        step(learner, images, labels)
    clone = copied(learner)
    assert clone.diversity.model is clone.model
    assert clone.diversity.model is not learner.model
    with torch.no_grad():
        for p in clone.parameters():
            p.mul_(1.1)
    whole = Learner(model(), **options)  # made of the changed weights, never copied
    whole.load_state_dict(clone.state_dict())
    whole.diversity.step = clone.diversity.step
    torch.testing.assert_close(step(clone, images, labels), step(whole, images, labels))
    classes = [type(m) for m in clone.modules()]
    original = step(learner, images, labels)
    assert [type(m) for m in clone.modules()] == classes
    again = Learner(model(), **options)
    again.load_state_dict(learner.state_dict())
    again.diversity.step = learner.diversity.step - 1
    torch.testing.assert_close(original, step(again, images, labels))


def test_a_model_that_holds_its_own_watcher(copied):
    """A cycle: the context is copied before the copy of its model is complete."""
    model = diverse_vit()
    model.diversity = dvf.HeadDiversity(model, layers="all")
    images = images_for(model)
    clone = copied(model)
    assert clone.diversity.model is clone
    with model.diversity:
        expect = model.diversity.penalty(model(images))
    with clone.diversity:
        found = clone.diversity.penalty(clone(images))
    torch.testing.assert_close(found, expect)


def test_what_a_copy_keeps(copied):
    draw = torch.Generator().manual_seed(7)
    options = {
        "every": 3,
        "fraction": 0.5,
        "generator": draw,
        "grad_scale": 2.0,
        "target": "probability",
    }
    learner = Learner(diverse_vit(), reduction="pairs", granularity="sample", **options)
    images, labels = images_for(learner.model), labels_for(images_for(learner.model))
    step(learner, images, labels)
    learner.diversity.step = 3
    clone = copied(learner).diversity
    for name in ("every", "step", "wrt", "granularity", "reduction", "target", "num_heads"):
        assert getattr(clone, name) == getattr(learner.diversity, name)
    torch.testing.assert_close(clone.cosines, learner.diversity.cosines)
    assert torch.equal(clone.samples, learner.diversity.samples)
    with clone:
        found = clone.penalty(clone.model(images))
    with learner.diversity:
        expect = learner.diversity.penalty(learner.model(images))
    torch.testing.assert_close(found, expect)
    assert torch.equal(
        clone.samples, learner.diversity.samples
    )  # drawn anew, from generators alike


def test_a_copy_made_between_forward_and_penalty(copied):
    """The penalty belongs to the original, whose logits they are."""
    learner = Learner(diverse_vit())
    images = images_for(learner.model)
    with learner.diversity:
        logits = learner.model(images)
    clone = copied(learner).diversity
    with pytest.raises(UsageError, match="logits computed under this context"):
        clone.penalty(logits)
    assert learner.diversity.penalty(logits) > 0


def test_a_shallow_copy_is_a_second_watcher_of_the_same_model():
    model = diverse_vit()
    images = images_for(model)
    one = dvf.HeadDiversity(model, every=2)
    two = copy.copy(one)
    assert two.model is model
    with one, two:
        logits = model(images)
    assert (one.step, two.step) == (1, 1)
    assert one.penalty(logits) > 0
    assert two.penalty(logits) > 0


def test_a_shallow_copy_draws_for_itself():
    model = diverse_vit()
    images = images_for(model)
    one = dvf.HeadDiversity(model, layers="all", fraction=0.5)
    two = copy.copy(one)
    with one:
        logits = model(images)
    with two:
        others = model(images)
    assert one.penalty(logits) > 0
    assert two.penalty(others) > 0


CONTEXTS = {
    "HeadDiversity": lambda model: dvf.HeadDiversity(model),
    "capture_heads": lambda model: dvf.capture_heads(model),
    "keep_heads": lambda model: dvf.keep_heads(model, {-1: [0]}),
}


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_inside_its_block_it_is_refused_in_one_line(context, how):
    model = diverse_vit()
    images, watcher = images_for(model), context(model)
    holder = nn.Module()
    holder.model, holder.watcher = model, watcher
    with watcher:
        for x in (watcher, holder)[how is copy.copy :]:
            with pytest.raises(UsageError, match="outside its `with` block") as refused:
                how(x if how is not copy.copy else watcher)
            assert "\n" not in str(refused.value)
        logits = model(images)
    assert torch.isfinite(logits).all()
    how(watcher)


def test_copies_of_keep_heads_mask_the_copied_model(copied):
    holder = nn.Module()
    holder.model = diverse_vit()
    holder.keep = dvf.keep_heads(holder.model, {-1: [1]})
    images = images_for(holder.model)
    clone = copied(holder)
    with holder.keep:
        expect = holder.model(images)
    assert not torch.allclose(clone.model(images), expect)
    with clone.keep:
        torch.testing.assert_close(clone.model(images), expect)
        assert not torch.allclose(holder.model(images), expect)


def test_copies_of_captured_heads(copied):
    holder = nn.Module()
    holder.model = diverse_vit()
    holder.heads = dvf.capture_heads(holder.model)
    images = images_for(holder.model)
    with holder.heads:
        holder.model(images)
    clone = copied(holder)
    for mine, its in zip(holder.heads, clone.heads, strict=True):
        assert torch.equal(mine, its)
        assert mine.requires_grad
        assert not its.requires_grad
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    with clone.heads:
        clone.model(images)
    assert all(not heads.any() for heads in clone.heads)
    assert all(heads.any() for heads in holder.heads)


def test_a_shallow_copy_of_captured_heads_keeps_their_graph():
    model = diverse_vit()
    with dvf.capture_heads(model) as heads:
        model(images_for(model))
    clone = copy.copy(heads)
    with heads:  # which forgets its own
        pass
    clone[-1].sum().backward()
    assert model.blocks[-1].attn.qkv.weight.grad is not None


def test_copies_of_a_prefix_cache_run_the_copied_model(copied):
    holder = nn.Module()
    holder.model = diverse_vit().eval()
    layers = dvf.HeadDiversity(holder.model).layers
    holder.cache = PrefixCache(holder.model, layers)
    images = images_for(holder.model)
    clone = copied(holder)
    choices = [{layers[0].index: [0]}, {layers[0].index: [1]}]
    for one in (holder, clone):
        with one.cache:
            found = list(one.cache.outputs(choices, images))
        for choice, output in zip(choices, found, strict=True):
            with dvf.keep_heads(one.model, choice), torch.no_grad():
                torch.testing.assert_close(output, one.model(images))


def test_modules_know_nothing_of_the_forwards_of_their_originals(copied):
    model = diverse_vit()
    holder = nn.Module()
    holder.model, holder.penalty = model, dvf.nn.HeadPenalty(wrt="output", reduction="pairs")
    images = images_for(model)
    score = model(images).max(-1).values
    clone = copied(holder)
    assert (clone.penalty.wrt, clone.penalty.reduction) == ("output", "pairs")
    with pytest.raises(UsageError, match="a forward whose graph is alive"):
        clone.penalty(score, clone.model.blocks[-1].attn)
    expect = holder.penalty(score, model.blocks[-1].attn)
    score = clone.model(images).max(-1).values
    torch.testing.assert_close(clone.penalty(score, clone.model.blocks[-1].attn), expect)


def test_results_are_plain_values(copied):
    model = diverse_vit().eval()
    images = images_for(model)
    batches = [(images, labels_for(images))]
    found = nn.Module()
    found.choices = dvf.select_heads(model, batches)
    found.support = dvf.supported(model)
    clone = copied(found)
    assert clone.choices == found.choices
    assert clone.support == found.support


@compiles_losses
def test_a_copied_watcher_in_a_compiled_loss():
    learner = copy.deepcopy(Learner(diverse_vit()))
    images, labels = images_for(learner.model), labels_for(images_for(learner.model))
    expect = step(learner, images, labels)[0]

    def loss(model, x, y):
        with learner.diversity:
            logits = model(x)
        return F.cross_entropy(logits, y) + 10 * learner.diversity.penalty(logits)

    found = dvf.compile_loss(loss, backend="aot_eager")(learner.model, images, labels)
    torch.testing.assert_close(found.detach(), expect)
