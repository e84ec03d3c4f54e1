"""Keeping, removing and choosing heads: masked equals pruned, and the best head is found."""

import copy
import weakref
from functools import partial
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from timm.models import vision_transformer
from torch.utils.flop_counter import FlopCounterMode

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.models import DiverseViT
from tests.helpers import vits
from tests.helpers.vits import images_for

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
    """Selection finds the one head that decides."""

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
        "no labels": ({"strip": 1}, "loader: expected labels"),
        "label shape": ({"labels": torch.ones(2)}, "labels: expected shape [16]"),
        "no reference": ({"score": "atc"}, "reference_loader: expected labelled in-distribution"),
        "a reference": ({"reference_loader": []}, "reference_loader: expected nothing"),
        "confidence": (
            {"score": "confidence", "reference_loader": []},
            "reference_loader: expected nothing",
        ),
        "empty reference": (
            {"score": "atc", "reference_loader": []},
            "reference_loader: expected at least one batch",
        ),
        "reference labels": (
            {"score": "atc", "reference_loader": [torch.zeros(2, 3, 16, 8).double()]},
            "reference_loader: expected labels",
        ),
        "greedy iterator": (
            {"search": "greedy", "loader": iter([])},
            "loader: expected data that can be run through again for search='greedy', got an iter",
        ),
        "greedy reference iterator": (
            {"search": "greedy", "score": "atc", "reference_loader": iter([])},
            "reference_loader: expected data that can be run through again",
        ),
    }

    @pytest.mark.parametrize("name", BAD)
    def test_bad_input(self, planted, name):
        model, loader = planted
        options, message = dict(self.BAD[name][0]), self.BAD[name][1]
        loader = options.pop("loader", loader)
        if "labels" in options:
            labels = options["labels"]
            one = isinstance(labels, int)
            loader = [(x, y * 0 + labels if one else labels, g) for x, y, g in loader]
        if options.pop("groups", True) is False:
            loader = [(x, y) for x, y, _ in loader]
        if "strip" in options:
            loader = [batch[: options.pop("strip", 1)] for batch in loader]
        if options.pop("nan", False):
            model.head.bias.data[0] = torch.nan
        options.pop("labels", None)
        with pytest.raises(UsageError) as failure:
            dvf.select_heads(model, loader, **options)
        assert str(failure.value).startswith(message), failure.value
        assert "\n" not in str(failure.value)
        assert model.training
        assert type(model.blocks[0]).__name__ == "Block"

    def test_too_many_combinations(self):
        model = timm_vit()
        for block in model.blocks:
            block.attn.num_heads, block.attn.head_dim = 12, 2
        with pytest.raises(UsageError, match="search: expected at most 4096"):
            dvf.select_heads(model, [], layers="all", search="exhaustive")


@torch.no_grad()
def logits_of(model, kept, images):
    with dvf.keep_heads(model, kept):
        return model(images).float()


def accuracy(logits, labels, groups):
    return (logits.argmax(-1) == labels).double().mean().item()


def worst_group(logits, labels, groups):
    found = [accuracy(logits[groups == g], labels[groups == g], None) for g in groups.unique()]
    return min(found)


def first_logit(logits, labels, groups):
    return logits[0, 0].item() + logits[-1, 1].item()


def confidence(logits, labels=None, groups=None):
    return logits.double().softmax(-1).max(-1).values.mean().item()


SCORES = {
    "accuracy": ("accuracy", accuracy),
    "worst-group": ("worst_group", worst_group),
    "callable": (first_logit, first_logit),
    "confidence": ("confidence", confidence),
}


def by_hand(layers, count, search, scored):
    """The documented candidates, each scored in a forward of its own."""
    if search == "single":
        kept = [{layer: [h]} for layer in layers for h in range(count)]
        return [(k, scored(k)) for k in kept]
    if search == "exhaustive":
        subsets = [[h for h in range(count) if n >> h & 1] for n in range(1, 2**count)]
        each = product(subsets, repeat=len(layers))
        kept = [dict(zip(layers, heads, strict=True)) for heads in each]
        return [(k, scored(k)) for k in kept]
    start = {layer: list(range(count)) for layer in layers}
    path = [(start, scored(start))]
    while any(len(heads) > 1 for heads in path[-1][0].values()):
        steps = [
            {**path[-1][0], layer: [h for h in heads if h != dropped]}
            for layer, heads in path[-1][0].items()
            if len(heads) > 1
            for dropped in heads
        ]
        path.append(max(((k, scored(k)) for k in steps), key=lambda step: step[1]))
    return path


def data_for(model, batches=(5, 3, 4), seed=3):
    g = torch.Generator().manual_seed(seed)
    size = (16, 8) if isinstance(model, DiverseViT) else (16, 16)
    return [
        (
            torch.randn(n, 3, *size, generator=g, dtype=torch.float64),
            torch.randint(0, 2, (n,), generator=g),
            torch.randint(0, 3, (n,), generator=g),
        )
        for n in batches
    ]


PARALLEL = {"block_fn": vision_transformer.ParallelThingsBlock, "num_heads": 3}
SELECTED = {
    "diverse-vit": (partial(diverse_vit, depth=3), [2], 4),
    "diverse-vit-two-layers": (partial(diverse_vit, depth=3, num_heads=3), [0, 2], 3),
    "timm": (timm_vit, [1], 4),
    "timm-qk-norm-dropout": (partial(timm_vit, qk_norm=True, proj_drop_rate=0.5), [0], 4),
    "timm-parallel": (partial(timm_vit, **PARALLEL), [1, 2], 3),
}


@torch.no_grad()
def varied(model):
    """A model whose weights make it predict every class."""
    g = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p += 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


@pytest.mark.parametrize("search", ["single", "greedy", "exhaustive"])
@pytest.mark.parametrize("name", SELECTED)
def test_scores_are_those_of_keep_heads(name, search):
    """Every candidate's score, exactly: the prefix cache changes nothing."""
    make, layers, count = SELECTED[name]
    model = varied(make()).train()
    data = data_for(model, (25, 12, 23))
    images, labels, groups = (torch.cat(x) for x in zip(*data, strict=True))
    chosen = {
        key: dvf.select_heads(model, data, layers=layers, search=search, score=score)
        for key, (score, _) in SCORES.items()
    }
    assert all(m.training for m in model.modules())
    model.eval()
    known = {}

    def logits(kept):
        if str(kept) not in known:
            parts = images.split([25, 12, 23])
            known[str(kept)] = torch.cat([logits_of(model, kept, part) for part in parts])
        return known[str(kept)]

    for key, (_, score) in SCORES.items():
        expect = by_hand(layers, count, search, lambda k, f=score: f(logits(k), labels, groups))
        values = [choice.score for choice in chosen[key]]
        assert values == sorted(values, reverse=True)
        ours = {str(choice.kept): choice.score for choice in chosen[key]}
        exact = 1e-13 if key == "confidence" else 0  # which is summed in another order
        assert ours == {str(kept): pytest.approx(v, rel=exact, abs=0) for kept, v in expect}
        assert len(set(values)) > 1


def test_ties_keep_more_heads_then_lower_indices():
    model = diverse_vit()
    choices = dvf.select_heads(model, data_for(model), search="exhaustive", score=lambda *_: 0.5)
    heads = [choice.kept[1] for choice in choices]
    assert heads == sorted(heads, key=lambda h: (-len(h), h))


def test_distributed_data_parallel():
    """The model inside is run and attached to."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = diverse_vit()
        ours = dvf.select_heads(torch.nn.parallel.DistributedDataParallel(model), data_for(model))
        assert ours == dvf.select_heads(model, data_for(model))
    finally:
        torch.distributed.destroy_process_group()


class Loader:
    """Batches, and how often they were run through."""

    def __init__(self, batches):
        self.batches, self.runs = batches, 0

    def __iter__(self):
        self.runs += 1
        return iter(self.batches)


class TestLoaders:
    @pytest.mark.parametrize(("search", "runs"), [("single", 1), ("exhaustive", 1), ("greedy", 3)])
    def test_runs_and_products(self, search, runs):
        """One run of the loader per round; each batch runs whole once per run, its end once per candidate."""
        model = timm_vit(num_classes=2).eval()
        loader = Loader(data_for(model))
        with FlopCounterMode(display=False) as counter:
            dvf.select_heads(model, loader, search=search)
        assert loader.runs == runs
        with FlopCounterMode(display=False) as once, torch.no_grad():
            for images, *_ in loader.batches:
                model(images)
        end = 2 * 12 * (5 * 9 * 24 * 24 + 24 * 2)  # proj, fc1, fc2 of 5 tokens, head; 12 images
        candidates = {"single": 4, "exhaustive": 15, "greedy": 1 + 4 + 3 + 2}[search]
        expect = runs * once.get_total_flops() + (candidates - runs) * end
        assert counter.get_total_flops() == expect

    @pytest.mark.parametrize("search", ["single", "exhaustive"])
    def test_an_iterator_is_enough_for_one_run(self, search):
        model = diverse_vit()
        data = data_for(model)
        once = dvf.select_heads(model, iter(data), search=search)
        assert once == dvf.select_heads(model, data, search=search)

    def test_one_batch_at_a_time(self):
        """The kept outputs of a batch are gone when the next is asked for."""
        model = diverse_vit()
        data = data_for(model)
        made = []
        model.blocks[0].register_forward_hook(lambda m, i, out: made.append(weakref.ref(out)))

        def loader():
            for batch in data:
                assert not any(reference() is not None for reference in made)
                yield batch

        dvf.select_heads(model, loader(), search="exhaustive")
        assert len(made) == len(data) * 15

    def test_outputs_with_logits(self):
        """As transformers returns them."""

        class Wrapped(torch.nn.Module):
            def __init__(self, model, key):
                super().__init__()
                self.model, self.key = model, key

            def forward(self, images):
                return SimpleNamespace(**{self.key: self.model(images)})

        model = diverse_vit()
        data = data_for(model)
        ours = dvf.select_heads(Wrapped(model, "logits"), data, search="exhaustive")
        assert ours == dvf.select_heads(model, data, search="exhaustive")
        with pytest.raises(UsageError, match=r"model: expected logits \[B, classes\], got Simple"):
            dvf.select_heads(Wrapped(model, "last_hidden_state"), data)


class TestWithoutLabels:
    @pytest.mark.parametrize("search", ["single", "greedy", "exhaustive"])
    def test_labels_are_not_looked_at(self, search):
        model = diverse_vit()
        data, reference = data_for(model), data_for(model, seed=4)
        for options in ({"score": "confidence"}, {"score": "atc", "reference_loader": reference}):
            ours = dvf.select_heads(model, data, search=search, **options)
            bare = dvf.select_heads(model, [x for x, *_ in data], search=search, **options)
            wrong = [(x, y * 0 - 7, g) for x, y, g in data]
            assert ours == bare == dvf.select_heads(model, wrong, search=search, **options)
            assert len({choice.score for choice in ours}) > 1

    def test_average_thresholded_confidence(self):
        """Garg et al.: as many of the reference below the threshold as are wrong there."""
        model = diverse_vit()
        data, reference = data_for(model, (7, 6)), data_for(model, (8, 9), seed=4)
        choices = dvf.select_heads(
            model, data, search="exhaustive", score="atc", reference_loader=iter(reference)
        )
        assert len(choices) == 15
        model.eval()

        def over(batches, kept):
            logits = torch.cat([logits_of(model, kept, x) for x, *_ in batches]).double()
            return logits.softmax(-1).max(-1).values, logits.argmax(-1)

        for choice in choices:
            confidences, predicted = over(reference, choice.kept)
            right = (predicted == torch.cat([y for _, y, _ in reference])).double().mean()
            above = [(confidences >= t).double().mean() for t in confidences]
            threshold = next(t for t, a in zip(confidences, above, strict=True) if a == right)
            target = over(data, choice.kept)[0]
            assert choice.score == (target >= threshold).double().mean()
        assert len({choice.score for choice in choices}) > 2

    @pytest.mark.parametrize(("wrong", "score"), [(False, 1.0), (True, 0.0)])
    def test_the_reference_itself_is_estimated_exactly(self, wrong, score):
        model = diverse_vit()
        images = data_for(model)[0][0]
        labels = logits_of(model.eval(), {1: [2]}, images).argmax(-1) ^ wrong
        choices = dvf.select_heads(
            model, [images], score="atc", reference_loader=[(images, labels)]
        )
        assert next(c.score for c in choices if c.kept == {1: [2]}) == score


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
