"""timm's extension point: attn_layer=Attention."""

from contextlib import nullcontext

import pytest
import timm
import torch

import diversevit_fast as dvf
from diversevit_fast.integrations.timm import Attention
from tests.helpers.eager import Eager, eager_penalty
from tests.helpers.vits import assert_same, gradients, images_for, timm_vit

KINDS = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_attn_norm": True},
}


def pair(**options):
    """The model with our layer and with timm's, same weights."""
    ours = timm_vit(attn_layer=Attention, **options)
    stock = timm_vit(**options)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.mark.parametrize("kind", KINDS)
def test_is_timms_and_differentiable_twice(kind):
    ours, stock = pair(**KINDS[kind])
    images = images_for(ours)
    results = []
    for model, mode in ((ours, nullcontext()), (stock, Eager())):
        x = images.clone().requires_grad_()
        with mode:
            logits = model(x)
        (g,) = torch.autograd.grad(logits.max(-1).values.sum(), x, create_graph=True)
        results.append([logits.detach(), *gradients(model, g.square().sum())])
    assert_same(*results)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": True}], ids=str)
def test_masks(options):
    ours, stock = (m.blocks[0].attn for m in pair())
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).double()
    if "attn_mask" in options:
        options = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(2)}
    torch.testing.assert_close(ours(x, **options), stock(x, **options))


def test_gate():
    torch.manual_seed(0)
    ours = Attention(24, 3, gated=True).double()
    stock = timm.layers.Attention(24, 3, gated=True).double()
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 24).double()
    torch.testing.assert_close(ours(x), stock(x))


def test_head_diversity_and_pruning_see_it():
    ours, stock = pair()
    images = images_for(ours)
    diversity = dvf.HeadDiversity(ours)
    with diversity:
        logits = ours(images)
    penalty = diversity.penalty(logits)
    _, expect = eager_penalty(stock, images, stock.blocks[-1].attn, "input")
    torch.testing.assert_close(penalty, expect)
    assert_same(gradients(ours, penalty), gradients(stock, expect))
    with dvf.keep_heads(ours, {-1: [1]}):
        masked = ours(images)
    torch.testing.assert_close(dvf.prune_heads(ours, {-1: [1]})(images), masked)


def test_attention_dropout_in_training():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, attn_layer=Attention
    )
    model.blocks[0].attn.attn_drop.p = 0.5
    images = torch.randn(1, 3, 16, 16)
    one, two = (model.train()(images) for _ in range(2))
    assert not torch.equal(one, two)
    one, two = (model.eval()(images) for _ in range(2))
    assert torch.equal(one, two)
