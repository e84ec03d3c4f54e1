"""Keeping, removing and choosing heads: masked equals pruned, and the best head is found."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
import vits
from vits import images_for

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.models import DiverseViT

diverse_vit = partial(vits.diverse_vit, depth=2)
timm_vit = partial(vits.timm_vit, depth=2, num_heads=4, num_classes=3)
MODELS = {
    "diverse-vit": diverse_vit,
    "timm": timm_vit,
    "timm-qk-norm": lambda: timm_vit(qk_norm=True),
    "timm-no-bias": lambda: timm_vit(qkv_bias=False),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return request.param()


CHOICES = {"one": {-1: [2]}, "two-layers": {0: [0, 3], 1: [1, 2, 0]}, "all": {0: [3, 2, 1, 0]}}


@pytest.mark.parametrize("kept", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
class TestMaskedEqualsPruned:
    def test_logits_and_gradients(self, model, kept, rescale):
        images = images_for(model)
        pruned = dvf.prune_heads(copy.deepcopy(model), kept, rescale=rescale)
        with dvf.keep_heads(model, kept, rescale=rescale):
            masked = model(images)
        torch.testing.assert_close(pruned(images), masked, rtol=1e-10, atol=1e-10)
        if any(len(heads) < 4 for heads in kept.values()):
            assert not torch.allclose(masked, model(images))
            count = [sum(p.numel() for p in m.parameters()) for m in (pruned, model)]
            assert count[0] < count[1]
        else:
            torch.testing.assert_close(masked, model(images))
        name, weight = next((n, p) for n, p in model.named_parameters() if p.ndim > 1)
        ours, theirs = (
            torch.autograd.grad(out.sin().sum(), p)[0]
            for out, p in (
                (masked, weight),
                (pruned(images), dict(pruned.named_parameters())[name]),
            )
        )
        torch.testing.assert_close(ours, theirs)

    def test_saved_and_reloaded(self, model, kept, rescale):
        images = images_for(model)
        fresh = copy.deepcopy(model)
        pruned = dvf.prune_heads(model, kept, rescale=rescale)
        dvf.prune_heads(fresh, kept).load_state_dict(pruned.state_dict())
        torch.testing.assert_close(fresh(images), pruned(images))


def test_masking_equals_zeroing_the_projection():
    """An independent definition: zero the columns of the output projection that read other heads."""
    model = diverse_vit()
    images = images_for(model)
    with dvf.keep_heads(model, {-1: [1]}):
        masked = model(images)
    with torch.no_grad():
        weight = model.blocks[-1].attn.proj.weight.view(16, 4, 8)
        weight[:, [0, 2, 3]] = 0
        weight[:, 1] *= 4
    torch.testing.assert_close(masked, model(images))


def test_pruning_twice_counts_from_the_original():
    model = diverse_vit()
    dvf.prune_heads(model, {-1: [0, 2, 3]})
    dvf.prune_heads(model, {-1: [1, 2]})
    assert model.blocks[-1].attn.kept_heads == (2, 3)
    assert model.blocks[-1].attn.num_heads == 2


def test_pruned_models_can_be_regularised():
    model = dvf.prune_heads(diverse_vit(), {-1: [0, 2]})
    diversity = dvf.HeadDiversity(model)
    with diversity:
        logits = model(images_for(model))
    diversity.penalty(logits).backward()
    assert diversity.num_heads == [2]


def test_capture_heads(model):
    images = images_for(model)
    with dvf.capture_heads(model, layers="all") as heads:
        logits = model(images)
    tokens = 9 if isinstance(model, DiverseViT) else 5
    assert len(heads) == 2
    assert heads[-1].shape[:3] == (3, 4, tokens)
    grads = torch.autograd.grad(logits.sum(), [heads[0], heads[1]])
    assert all(g.abs().max() > 0 for g in grads)
    torch.testing.assert_close(logits, model(images), rtol=0, atol=0)
    with pytest.raises(IndexError):
        heads[2]
    with (
        dvf.capture_heads(model) as heads,
        pytest.raises(UsageError, match=r"heads\[0\]: expected"),
    ):
        heads[0]


class TestSelectHeads:
    """A model in which one head alone decides is found to be decided by it."""

    @pytest.fixture
    def planted(self):
        """Labels are what the model says with only head 2 of the last layer."""
        model = diverse_vit().train()
        images = images_for(model, 40)
        with torch.no_grad(), dvf.keep_heads(model, {-1: [2]}):
            logits = model(images)
        threshold = (logits[:, 0] - logits[:, 1]).median()
        with torch.no_grad():
            model.head.bias[0] -= threshold
            with dvf.keep_heads(model, {-1: [2]}):
                labels = model(images).argmax(-1)
        groups = 2 * labels + torch.arange(40) % 2
        loader = [(images[i : i + 16], labels[i : i + 16], groups[i : i + 16]) for i in (0, 16, 32)]
        return model, loader

    @pytest.mark.parametrize("score", ["accuracy", "worst_group"])
    @pytest.mark.parametrize("search", ["single", "exhaustive"])
    def test_finds_the_planted_head(self, planted, search, score):
        model, loader = planted
        choices = dvf.select_heads(model, loader, search=search, score=score)
        assert len(choices) == {"single": 4, "exhaustive": 15}[search]
        assert choices[0].score == 1.0
        assert {1: [2]} in [c.kept for c in choices if c.score == 1.0]
        assert [c.score for c in choices] == sorted((c.score for c in choices), reverse=True)
        assert choices[-1].score < 1.0
        assert model.training

    def test_greedy_path(self, planted):
        model, loader = planted
        choices = dvf.select_heads(model, loader, search="greedy")
        assert sorted(len(c.kept[1]) for c in choices) == [1, 2, 3, 4]
        path = sorted(choices, key=lambda c: -len(c.kept[1]))
        for before, after in pairwise(path):
            assert set(after.kept[1]) < set(before.kept[1])

    def test_scores_are_those_of_keep_heads(self, planted):
        model, loader = planted
        for choice in dvf.select_heads(model, loader, layers="all"):
            correct = 0
            with torch.no_grad(), dvf.keep_heads(model, choice.kept):
                for images, labels, _ in loader:
                    correct += (model(images).argmax(-1) == labels).sum().item()
            assert choice.score == pytest.approx(correct / 40)

    def test_callable_score(self, planted):
        model, loader = planted
        choices = dvf.select_heads(model, loader, score=lambda logits, labels, groups: logits[0, 0])
        assert len({c.score for c in choices}) == 4

    BAD = {
        "search": ({"search": "random"}, "search: expected one of"),
        "score": ({"score": "f1"}, "score: expected one of"),
        "empty": ({"loader": []}, "loader: expected at least one batch"),
        "labels": ({"labels": 7}, "labels: expected class indices from 0 to 1"),
        "groups": ({"groups": False, "score": "worst_group"}, "loader: expected groups"),
        "nan": ({"nan": True}, "model: expected finite logits"),
    }

    @pytest.mark.parametrize("name", BAD)
    def test_bad_input(self, planted, name):
        model, loader = planted
        options, message = dict(self.BAD[name][0]), self.BAD[name][1]
        loader = options.pop("loader", loader)
        if "labels" in options:
            loader = [(x, y * 0 + options["labels"], g) for x, y, g in loader]
        if options.pop("groups", True) is False:
            loader = [(x, y) for x, y, _ in loader]
        if options.pop("nan", False):
            model.head.bias.data[0] = torch.nan
        options.pop("labels", None)
        with pytest.raises(UsageError) as failure:
            dvf.select_heads(model, loader, **options)
        assert str(failure.value).startswith(message), failure.value

    def test_too_many_combinations(self):
        model = timm_vit()
        for block in model.blocks:
            block.attn.num_heads, block.attn.head_dim = 12, 2
        with pytest.raises(UsageError, match="search: expected at most 4096"):
            dvf.select_heads(model, [], layers="all", search="exhaustive")


BAD_HEADS = {
    "empty": ({}, "heads: expected a dictionary"),
    "no heads": ({0: []}, "heads: expected a list of different heads"),
    "head": ({0: [4]}, "heads: expected a list of different heads from 0 to 3"),
    "negative head": ({0: [-1]}, "heads: expected a list"),
    "twice": ({0: [1, 1]}, "heads: expected a list of different"),
    "layer": ({2: [0]}, "layers: expected layer indices from -2 to 1"),
    "layer twice": ({1: [0], -1: [1]}, "heads: expected each layer once"),
    "layer name": ({"last": [0]}, "layers: expected layer indices"),
}


@pytest.mark.parametrize("name", BAD_HEADS)
@pytest.mark.parametrize("act", [dvf.keep_heads, dvf.prune_heads])
def test_bad_heads_change_nothing(name, act):
    model = diverse_vit()
    heads, message = BAD_HEADS[name]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError) as failure:
        act(model, {0: [1], **heads} if name == "layer" else heads)
    assert str(failure.value).startswith(message), failure.value
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_that_mix_heads_are_not_pruned():
    model = timm_vit(scale_attn_norm=True)
    with pytest.raises(UnsupportedError, match="keep_heads"):
        dvf.prune_heads(model, {0: [1]})
    with dvf.keep_heads(model, {0: [1]}):
        assert model(images_for(model)).shape == (3, 3)
