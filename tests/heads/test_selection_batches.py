"""Batches of ``select_heads``: each form works or is refused in one line before the model runs."""

from collections import UserDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from tests.heads.test_selection import data_for, varied
from tests.helpers import vits
from tests.helpers.zoo import ZOO

Triple = namedtuple("Triple", "image label group")
NAMES = ["land", "water", "sky"]


@pytest.fixture(scope="module")
def model():
    return varied(vits.diverse_vit(depth=2))


@pytest.fixture(scope="module")
def data(model):
    return data_for(model, (25, 12, 23))


def words(groups):
    return [NAMES[g] for g in groups]


SAME = {  # batches that say the same in other ways
    "list": lambda x, y, g: [x, y, g],
    "named tuple": Triple,
    "numpy": lambda x, y, g: (x.numpy(), y.numpy(), g.numpy()),
    "numpy answers": lambda x, y, g: (x, y.numpy(), g.numpy().astype(np.int16)),
    "lists": lambda x, y, g: (x, y.tolist(), tuple(g.tolist())),
    "lists of tensors": lambda x, y, g: (x, list(y), list(g)),
    "whole floats": lambda x, y, g: (x, y.float(), g.double()),
    "boolean labels": lambda x, y, g: (x, y.bool(), g),
    "string groups": lambda x, y, g: (x, y, words(g)),
    "tuples of strings": lambda x, y, g: (x, y, tuple(words(g))),
    "numpy strings": lambda x, y, g: (x, y, np.array(words(g))),
    "numpy objects": lambda x, y, g: (x, y, np.array(words(g), dtype=object)),
    "dictionary": lambda x, y, g: {"images": x, "labels": y, "groups": g},
    "its names": lambda x, y, g: {
        "label": y,
        "group": words(g),
        "images": x,
        "path": ["a"] * len(x),
    },
    "another name": lambda x, y, g: {"pixels": x, "label": y, "group": g, "path": ["a"] * len(x)},
    "user's dictionary": lambda x, y, g: UserDict(images=x, labels=y, groups=g),
}


@pytest.mark.parametrize("score", ["worst_group", "accuracy", "confidence", "atc"])
@pytest.mark.parametrize("name", SAME)
def test_the_same_data_in_other_words(model, data, name, score):
    options = {"score": score}
    expect = dvf.select_heads(model, data, **options, **reference(score, data))
    batches = [SAME[name](*batch) for batch in data]
    ours = dvf.select_heads(model, batches, **options, **reference(score, batches))
    assert ours == expect
    assert len({choice.score for choice in ours}) > 1


def reference(score, data):
    return {"reference_loader": data} if score == "atc" else {}


def test_groups_by_name_across_batches(model, data):
    """A group's samples are counted together wherever they come."""
    shuffled = [(x, y, words(g)) for x, y, g in reversed(data)]
    named = dvf.select_heads(model, shuffled, score="worst_group")
    assert named == dvf.select_heads(model, data, score="worst_group")


def test_a_callable_is_given_numbers(model, data):
    seen = []

    def score(logits, labels, groups):
        seen.append(groups)
        return float((logits.argmax(-1) == labels)[groups == 1].double().mean())

    expect = dvf.select_heads(model, data, score=score)
    assert expect == dvf.select_heads(
        model, [(x, y.numpy(), g.tolist()) for x, y, g in data], score=score
    )
    assert all(isinstance(groups, torch.Tensor) for groups in seen)
    dvf.select_heads(model, [(x, y, None) for x, y, _ in data], score=lambda a, b, c: c is None)


BAD = {  # the batch, the score, what is said
    "string labels": (
        lambda x, y, g: (x, words(g), g),
        "accuracy",
        "labels: expected class indices, got str",
    ),
    "numpy labels": (
        lambda x, y, g: (x, np.array(words(g)), g),
        "accuracy",
        "labels: expected class indices, got str",
    ),
    "fractions": (
        lambda x, y, g: (x, y + 0.5, g),
        "accuracy",
        "labels: expected class indices, got numbers",
    ),
    "no number": (
        lambda x, y, g: (x, y * torch.nan, g),
        "accuracy",
        "labels: expected class indices",
    ),
    "one-hot": (
        lambda x, y, g: (x, nn.functional.one_hot(y, 2), g),
        "accuracy",
        "labels: expected shape [25], got [25, 2]",
    ),
    "one label": (lambda x, y, g: (x, 1, g), "accuracy", "labels: expected shape [25], got []"),
    "no labels": (lambda x, y, g: (x, None, g), "accuracy", "loader: expected labels"),
    "a dictionary's labels": (
        lambda x, y, g: {"images": x, "y": y},
        "accuracy",
        "loader: expected labels",
    ),
    "two labels": (
        lambda x, y, g: {"images": x, "labels": y, "label": y},
        "accuracy",
        "loader: expected one of labels and label",
    ),
    "unclear dictionary": (
        lambda x, y, g: {"a": x, "b": x, "labels": y},
        "accuracy",
        "loader: expected batches",
    ),
    "empty dictionary": (lambda x, y, g: {}, "accuracy", "loader: expected batches"),
    "object": (lambda x, y, g: SimpleNamespace(x=x), "accuracy", "loader: expected batches"),
    "nothing": (lambda x, y, g: None, "accuracy", "loader: expected batches"),
    "empty": (lambda x, y, g: (), "accuracy", "loader: expected batches"),
    "pictures": (lambda x, y, g: ([object()] * 25, y), "accuracy", "loader: expected batches"),
    "four": (lambda x, y, g: (x, y, g, g), "accuracy", "loader: expected batches"),
    "a number": (lambda x, y, g: (torch.tensor(1.0), y), "accuracy", "loader: expected batches"),
    "no groups": (lambda x, y, g: (x, y, None), "worst_group", "loader: expected groups"),
    "groups of objects": (
        lambda x, y, g: (x, y, [object()] * 25),
        "worst_group",
        "groups: expected numbers or strings, got object",
    ),
    "mixed groups": (
        lambda x, y, g: (x, y, ["a", 1, None, 2, "b"]),
        "worst_group",
        "groups: expected numbers or strings",
    ),
    "too few groups": (
        lambda x, y, g: (x, y, words(g)[1:]),
        "worst_group",
        "groups: expected shape [25], got [24]",
    ),
    "a group": (
        lambda x, y, g: (x, y, "land"),
        "worst_group",
        "groups: expected numbers or strings, got str",
    ),
    "metadata": (
        lambda x, y, g: (x, y, torch.stack([y, g], 1)),
        "worst_group",
        "groups: expected shape [25], got [25, 2]",
    ),
    "no group": (
        lambda x, y, g: (x, y, g * torch.nan),
        "worst_group",
        "groups: expected numbers, got NaN",
    ),
    "named, own score": (
        lambda x, y, g: (x, y, words(g)),
        lambda *_: 0.5,
        "groups: expected numbers, got str",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_batch(data, name):
    make, score, message = BAD[name]
    model = vits.diverse_vit(depth=2).train()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UsageError) as failure:
        dvf.select_heads(model, [make(*batch) for batch in data], score=score)
    assert str(failure.value).startswith(message), failure.value
    assert "\n" not in str(failure.value)
    assert [type(module) for module in model.modules()] == classes
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "loader", [None, 3, torch.zeros(2, 3, 16, 8), "data", {"images": 1}], ids=repr
)
def test_what_is_no_loader(model, loader):
    with pytest.raises(UsageError, match=r"^loader: expected an iterable of batches"):
        dvf.select_heads(model, loader)


class TestTransformers:
    """Their batches are dictionaries of the forward's arguments."""

    @pytest.fixture(scope="class")
    def vit(self):
        pytest.importorskip("transformers")
        torch.manual_seed(0)
        return varied(ZOO["HF ViT"].make().double())

    @pytest.fixture(scope="class")
    def batches(self):
        g = torch.Generator().manual_seed(1)
        return [
            {
                "pixel_values": torch.randn(n, 3, 16, 16, generator=g, dtype=torch.float64),
                "labels": torch.randint(0, 5, (n,), generator=g),
                "groups": torch.randint(0, 2, (n,), generator=g),
                "image_file_path": ["somewhere"] * n,
            }
            for n in (25, 20)
        ]

    @pytest.mark.parametrize("score", ["accuracy", "worst_group", "confidence"])
    def test_dictionaries(self, vit, batches, score):
        triples = [(b["pixel_values"], b["labels"], b["groups"]) for b in batches]
        ours = dvf.select_heads(vit, batches, score=score)
        assert ours == dvf.select_heads(vit, triples, score=score)
        assert len({choice.score for choice in ours}) > 1

    def test_what_a_processor_returns(self, vit, batches):
        from transformers import BatchFeature

        ours = dvf.select_heads(vit, [BatchFeature(data=batch) for batch in batches])
        assert ours == dvf.select_heads(vit, batches)

    def test_a_model_that_takes_anything(self, vit, batches):
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.vit = vit

            def forward(self, **inputs):
                return self.vit(**inputs)

        assert dvf.select_heads(Wrapped(), batches) == dvf.select_heads(vit, batches)


def test_several_inputs_by_name(data):
    """A model of an image and something else."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = varied(vits.diverse_vit(depth=2))

        def forward(self, image, shift):
            return self.vit(image + shift[:, None, None, None])

    model = Both()
    batches = [{"shift": g * 1.0, "image": x, "label": y} for x, y, g in data]
    moved = [(x + g[:, None, None, None], y) for x, y, g in data]
    assert dvf.select_heads(model, batches) == dvf.select_heads(model.vit, moved)
