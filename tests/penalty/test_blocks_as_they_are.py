"""Blocks that checkpoints run inside the context as they are, since a graph that is dropped would be missed."""

from collections import UserList

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError
from tests.helpers.checkpointed import (
    TOKENS,
    Listing,
    Model,
    assert_as_without,
    logits_and_loss,
    nodes_of,
)
from tests.helpers.vits import assert_same, gradients


@pytest.mark.parametrize("of", [lambda x: x * x, lambda x: x], ids=["square", "itself"])
def test_a_tensor_that_a_block_keeps_for_the_loss(of):
    model = Model()

    def keep(x):
        model.kept = of(x)
        return x

    model.blocks[1].extra = keep
    assert_as_without(model, 2)


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x[:, 0]], ids=["itself", "a-view"])
def test_an_input_that_a_block_keeps_for_the_loss(of):
    """No node of the block's graph saved anything of it."""
    model = Model()

    def keep(norm, x):
        model.kept = of(x)
        return nn.LayerNorm.forward(norm, x)

    class Keeping(nn.LayerNorm):
        forward = keep

    model.blocks[1].norm.__class__ = Keeping
    assert_as_without(model, 2)


def test_what_a_block_reads_of_a_graph_outside():
    model = Model()
    model.blocks[1].extra = lambda x: x * model.scaled
    forward = model.forward

    def scaled_first(x):
        model.scaled = model.scale.exp()
        return forward(x)

    model.forward = scaled_first
    assert_as_without(model, 2)


def test_hooks_inside_and_on_a_weight():
    model = Model()
    model.blocks[0].mlp.register_forward_hook(lambda _m, _i, out: 2 * out)
    model.blocks[2].mlp.weight.register_hook(lambda g: 3 * g)
    assert_as_without(model, 1)


def test_a_batch_norm():
    model = Model()
    model.blocks[1].extra = nn.Sequential(
        nn.Flatten(0, 1), nn.BatchNorm1d(8), nn.Unflatten(0, (2, 5))
    )
    model.blocks[1].add_module("norm2", model.blocks[1].extra)
    model.double()
    assert_as_without(model, 2)


def test_buffers_that_a_run_changes():
    """PyTorch's checkpoint runs this block again only up to the last tensor it needs: not as far as this."""
    model = Model()
    block = model.blocks[1]
    block.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
    block.register_buffer("last", torch.zeros(8, dtype=torch.float64))

    def follow(x):
        block.mean.mul_(0.9).add_(x.detach().mean((0, 1)))
        block.last = x.detach().mean((0, 1))
        return x - block.mean - block.last

    block.extra = follow
    found = []

    def ask(model, loss):
        wanted = gradients(model, loss)
        found.append((block.mean.clone(), block.last))
        block.mean.zero_()
        return wanted

    assert_as_without(model, 2, ask=ask)
    assert_as_without(model, 2, ask=ask)
    for one in found[1:]:
        assert_same(list(one), list(found[0]))


@pytest.mark.parametrize("container", [list, UserList])
def test_what_a_block_puts_into_an_argument(container):
    assert_as_without(Listing(container), 0)


def test_attention_in_float16_between_float64():
    """Its gradients vanish if they are not scaled."""

    class Half(type(Model().blocks[0].attn)):
        def forward(self, x):
            return super().forward(x.half()).double()

    model = Model()
    model.blocks[1].attn.__class__ = Half
    model.blocks[1].attn.half()
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    assert_as_without(model, 2)


def test_another_context():
    model = Model()
    model.checkpoints = True
    with dvf.capture_heads(model), dvf.HeadDiversity(model, layers="all"):
        assert nodes_of(model(TOKENS)) == 0


def test_a_reentrant_checkpoint_inside_is_refused():
    model = Model()
    model.checkpoints = True
    model.blocks[1].extra = lambda x: checkpoint(torch.sin, x, use_reentrant=True)
    with pytest.raises(UnsupportedError, match="pass use_reentrant=False"):
        logits_and_loss(model)


def test_where_it_is_not_wanted():
    assert_as_without(Model(), 0, checkpoint_blocks=False)


def test_no_checkpoint_and_outside():
    model = Model()
    with dvf.HeadDiversity(model, layers="all"):
        assert nodes_of(model(TOKENS)) == 0
    model.checkpoints = True
    assert nodes_of(model(TOKENS)) == 0
