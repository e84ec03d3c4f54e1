"""The baselines do what they stand for: PyTorch's operators, and the published penalty."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import diversevit_fast as dvf
from benchmarks.baselines import Stock, TwiceDifferentiableStock, plain_modules, published_penalty
from tests.helpers import published
from tests.helpers.vits import assert_same, diverse_vit, gradients, images_for, timm_vit

ATTENTION = {dvf.attention, dvf.attention_qkvpacked}
OURS = {dvf.layer_norm, dvf.gelu, *ATTENTION}
STOCK = {F.scaled_dot_product_attention, F.layer_norm, F.gelu}


class Called(TorchFunctionMode):
    """Collects the functions that are called."""

    def __init__(self):
        super().__init__()
        self.functions = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.add(func)
        return func(*args, **(kwargs or {}))


def attached(model: nn.Module) -> nn.Module:
    """The model inside ``HeadDiversity``, which makes it call our operators."""

    class Inside(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with dvf.HeadDiversity(model, layers="all"):
                return model(images)

    return Inside()


@pytest.mark.parametrize(
    ("make", "wrap"),
    [(diverse_vit, nn.Module.double), (diverse_vit, attached), (timm_vit, attached)],
    ids=["DiverseViT", "DiverseViT in HeadDiversity", "timm in HeadDiversity"],
)
@pytest.mark.parametrize("stock", [Stock, TwiceDifferentiableStock])
def test_stock_operators_run_in_place_of_ours(stock, make, wrap):
    model = make()
    images = images_for(model)
    model = wrap(model)
    with Called() as plain:
        ours = model(images)
    with Called() as replaced, stock():
        theirs = model(images)
    assert plain.functions >= OURS - ATTENTION
    assert plain.functions & ATTENTION
    assert not plain.functions & {F.scaled_dot_product_attention}
    assert replaced.functions >= STOCK
    assert not replaced.functions & OURS
    torch.testing.assert_close(theirs, ours)


def test_plain_modules_call_stock_operators_without_a_mode():
    model = diverse_vit()
    images = images_for(model)
    ours = model(images)
    with Called() as replaced, plain_modules():
        theirs = model(images)
    assert replaced.functions >= STOCK
    assert not replaced.functions & OURS
    torch.testing.assert_close(theirs, ours)


def test_the_penalty_is_the_published_one():
    """As restated for the tests of the library, with the gradient of every parameter."""
    model = diverse_vit()
    images = images_for(model)
    logits, penalty = published_penalty(model, images)
    expect_logits, expect = published.published_penalty(model, images, model.blocks[-1].attn)
    torch.testing.assert_close(logits, expect_logits)
    torch.testing.assert_close(penalty, expect)
    assert_same(gradients(model, penalty), gradients(model, expect))
