"""What cannot be predicted is said in one line."""

import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from tests.cost.test_counting import vit


class ReadsValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit, self.image_size = vit(), 32

    def forward(self, x):
        return self.vit(x if x.mean().item() > 0 else -x)


class PicksTokens(ReadsValues):
    def forward(self, x):
        return self.vit(x)[x.flatten(1).mean(1) > 0]


class NoLogits(ReadsValues):
    def forward(self, x):
        return self.vit.forward_features(x)


class Listed(ReadsValues):
    def __init__(self):
        super().__init__()
        self.hidden = [torch.ones(3)]

    def forward(self, x):
        return self.vit(x) + self.hidden[0].sum()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch: expected a whole number from 1"),
        ({"batch": -3}, "batch: expected"),
        ({"batch": True}, "batch: expected"),
        ({"batch": 2.5}, "batch: expected"),
        ({"batch": 10**30}, "batch: expected"),
        ({"batch": 2**31, "inputs": (3, 2**20, 2**20)}, "expected samples whose tensors"),
        ({"dtype": "int8"}, "dtype: expected float32, bfloat16 or float16"),
        ({"dtype": torch.float64}, "dtype: expected"),
        ({"optimizer": "lion"}, "optimizer: expected adamw"),
        ({"optimizer": lambda parameters: 3}, "optimizer: expected one that steps"),
        ({"optimizer": torch.optim.SparseAdam}, "does not support dense gradients"),
        ({"model": vit().requires_grad_(False)}, "model: expected parameters with a gradient"),
        ({"inputs": (3, 64, 64)}, "[2, 3, 64, 64] AssertionError (Input height (64)"),
        ({"inputs": (1, 32, 32)}, "to have 3 channels, but got 1 channels instead"),
        ({"inputs": (3, 0, 2)}, "inputs: expected"),
        ({"inputs": "big"}, "inputs: expected"),
        ({"inputs": torch.ones(3)}, "inputs: expected a batch"),
        ({"diversity": 3.5}, "diversity: expected"),
        ({"diversity": {"layers": "last", "every": 0}}, "every: expected"),
        ({"diversity": {"layers": "last", "fraction": 2.0}}, "fraction"),
        ({"diversity": "first"}, "layers"),
        ({"diversity": [7]}, "layers"),
        ({"model": "no_such_model"}, "model: expected a name of timm's"),
        ({"model": 3}, "model: expected a module"),
        ({"model": nn.Linear(2, 2)}, "inputs: expected the shape of a sample"),
        ({"model": ReadsValues()}, "cannot run on tensors without memory"),
        ({"model": PicksTokens()}, "cannot run on tensors without memory"),
        ({"model": Listed()}, "cannot run on tensors without memory"),
        ({"model": NoLogits()}, "expected logits"),
        ({"model": NoLogits(), "checkpointing": True}, "has no switch"),
    ],
)
def test_one_line(options, said):
    given = {"model": None, "batch": 2, **options}
    model = vit() if given["model"] is None else given["model"]
    del given["model"]
    with pytest.raises((dvf.UsageError, dvf.UnsupportedError)) as raised:
        dvf.cost(model, **given)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
