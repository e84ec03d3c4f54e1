"""Blocks that checkpoints run inside the context: gradients of every order are those without, and no graph is kept."""

import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast._torch_internals import function_modes
from diversevit_fast.attachment.torch_calls import open_attachments
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.testing import assert_within_budget
from tests.helpers.checkpointed import (
    TOKENS,
    Model,
    Returning,
    assert_as_without,
    logits_and_loss,
    nodes_of,
)
from tests.helpers.vits import assert_same, gradients, images_for, timm_vit


@pytest.mark.parametrize(("layers", "apart"), [("all", 3), ("last", 1), ([1], 2), ([0, 2], 3)])
@pytest.mark.parametrize("wrt", ["input", "output"])
def test_layers(layers, apart, wrt):
    assert_as_without(Model(), apart, layers=layers, wrt=wrt)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_timms_switch_runs_blocks_apart(layers):
    model = timm_vit().train()
    model.set_grad_checkpointing()
    with dvf.HeadDiversity(model, layers=layers):
        logits = model(images_for(model))
    assert nodes_of(logits) == {"all": 3, "last": 1}[layers]


class Saved:
    """A tensor that a graph saved."""

    def __init__(self, x):
        self.x = x


def test_less_is_kept_by_both_passes():
    """What graphs hold when loss and penalty are there, by hooks on what they save, weights aside."""

    def kept(model):
        weights = {p.data_ptr() for p in model.parameters()}
        alive, images = weakref.WeakSet(), images_for(model, batch=8)

        def pack(x):
            saved = Saved(x)
            alive.add(saved)
            return saved

        diversity = dvf.HeadDiversity(model, layers="all")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.x):
            with diversity:
                logits = model(images)
            penalty = diversity.penalty(logits)
        storages = {x.data_ptr(): x for x in (saved.x.untyped_storage() for saved in alive)}
        assert penalty.requires_grad
        return sum(x.nbytes() for place, x in storages.items() if place not in weights)

    model = timm_vit(global_pool="avg", class_token=False, depth=6).train()
    whole = kept(model)
    model.set_grad_checkpointing()
    assert kept(model) < whole / 6


def test_a_shared_block_and_a_frozen_one():
    model = Model(shared=True)
    assert_as_without(model, 4)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].attn.requires_grad_(False)
    assert_as_without(model, 4)
    model.requires_grad_(False).head.requires_grad_(True)
    assert_as_without(model)


@pytest.mark.parametrize(
    ("returned", "take"),
    [
        (lambda block, x, y: (y, None), lambda made: made[0]),
        (lambda block, x, y: {"a": None, "b": [y, 3.0]}, lambda made: made["b"][1] * made["b"][0]),
        (lambda block, x, y: (x, y), lambda made: made[0] + made[1]),
        (lambda block, x, y: (y, block.temperature), lambda made: made[0] * made[1]),
    ],
    ids=["none-last", "none-first", "its-input-first", "a-weight"],
)
def test_results(returned, take):
    assert_as_without(Returning(returned, take), 3)


@pytest.mark.parametrize("wrt", ["input", "output"])
def test_a_layer_in_a_result_that_nobody_reads(wrt):
    model = Returning(lambda block, x, y: (F.gelu(block.mlp(x)), y), lambda made: made[0])
    model.checkpoints = True
    with pytest.raises(UsageError, match=r"do not depend on blocks\.0\.attn, blocks\.1\.attn"):
        logits_and_loss(model, wrt=wrt)
    model.blocks[1].returned = lambda block, x, y: (y, y)
    with pytest.raises(UsageError, match=r"do not depend on blocks\.0\.attn, blocks\.2\.attn"):
        logits_and_loss(model, wrt=wrt)
    assert_as_without(model, layers=[1], wrt=wrt)


def test_backward_with_inputs_and_without():
    def by_backward(model, loss, inputs=None):
        model.zero_grad()
        loss.backward(inputs=inputs)
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_as_without(Model(), 3, ask=by_backward)
    assert_as_without(
        Model(), 3, ask=lambda model, loss: by_backward(model, loss, [model.blocks[1].mlp.weight])
    )


def test_gradient_of_the_images_and_third_order():
    """A gradient penalty of the loss, its penalty included, so that blocks are differentiated three times."""
    x = TOKENS.clone().requires_grad_()

    def ask(model, loss):
        weights = [model.blocks[0].attn.qkv.weight, model.blocks[2].mlp.weight, model.scale, x]
        inner = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in inner), weights)

    with dvf.use_backend("reference"):
        assert_as_without(Model(), 3, ask=ask, x=x)


def test_a_gradient_penalty_alone():
    """No penalty of heads is asked for, of the same graph."""
    x, found = TOKENS.clone().requires_grad_(), []
    model = Model()
    for model.checkpoints in (False, True):
        with dvf.HeadDiversity(model, layers="all"):
            logits = model(x)
        (inner,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        found.append(gradients(model, inner.square().sum() + logits.sum()))
    assert_same(*found)


def test_many_gradients_at_once():
    model, found = Model(), []
    each = torch.eye(3, dtype=torch.float64).unsqueeze(1).expand(3, 2, 3)
    for model.checkpoints in (False, True):
        with dvf.HeadDiversity(model, layers="all"):
            logits = model(TOKENS)
        weights = [model.blocks[0].mlp.weight, model.scale]
        found.append(torch.autograd.grad(logits, weights, each, is_grads_batched=True))
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_that_of_the_step_without(dtype):
    model, x = Model().float(), TOKENS.float()
    exact = gradients(model.double(), logits_and_loss(model)[1])
    model.float()

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            return gradients(model, logits_and_loss(model, x)[1])

    plain, model.checkpoints = step(), True
    for ours, eager, g in zip(step(), plain, exact, strict=True):
        budgeted = eager if dtype == torch.float32 else eager.bfloat16()
        assert_within_budget(ours, budgeted, g, terms=64)


def test_dropout_is_drawn_again_and_random_numbers_go_on():
    model = Model()
    model.blocks[1].extra = model.blocks[2].extra = nn.Dropout(0.3)
    after = []

    def seeded():
        torch.manual_seed(3)
        found = gradients(model, logits_and_loss(model)[1])
        after.append(torch.rand(1))
        return found

    wanted, model.checkpoints = seeded(), True
    assert_same(seeded(), wanted)
    assert after[0] == after[1]


@pytest.mark.parametrize("trained", [True, False])
def test_the_mode_is_that_of_the_forward(trained):
    model = Model()
    dropout = model.blocks[1].dropout = nn.Dropout(0.3)
    model.blocks[1].extra = lambda x: dropout(x)
    found = []
    for model.checkpoints in (False, True):
        torch.manual_seed(3)
        model.train(trained)
        loss = logits_and_loss(model)[1]
        model.train(not trained)
        found.append(gradients(model, loss))
        assert dropout.training is not trained
    assert_same(*found)


def test_every_and_two_forwards_in_one_block():
    model = Model()
    diversity, found = dvf.HeadDiversity(model, layers="all", every=2), []
    for model.checkpoints in (False, True):
        diversity.step = 0
        for _ in range(2):
            with diversity:
                logits = torch.cat([model(TOKENS), model(2 * TOKENS)])
            found.append(gradients(model, logits.square().sum() + 10 * diversity.penalty(logits)))
    assert_same(found[2], found[0])
    assert_same(found[3], found[1])


def test_saved_tensors_go_where_hooks_around_the_checkpoint_put_them():
    model, packed = Model(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        assert_as_without(model, 3)
    assert packed


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda linear: linear.requires_grad_(False), "Block is differentiated with other weights"),
        (
            lambda linear: linear.weight.detach().mul_(2),
            "Block is differentiated with other weights",
        ),
        (lambda linear: linear.weight.register_hook(torch.neg), "weight of Block got a hook"),
    ],
    ids=["frozen", "written", "hooked"],
)
def test_a_weight_that_is_changed_before_the_backward_pass_is_refused(change, match):
    model = Model()
    model.checkpoints = True
    loss = logits_and_loss(model)[1]
    change(model.blocks[1].mlp)
    with pytest.raises(UnsupportedError, match=match):
        loss.backward()


def test_an_overwritten_input_is_refused():
    model = Model()
    model.checkpoints = True
    x = TOKENS.clone()
    loss = logits_and_loss(model, x)[1]
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_block_that_changes_what_it_is_given_is_refused():
    model = Returning(lambda block, x, y: x.mul_(2) + y, lambda made: made)
    model.checkpoints = True
    with pytest.raises(UnsupportedError, match="Returns changes a tensor that it is given"):
        logits_and_loss(model, TOKENS.clone())


@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_an_exception_in_any_run_leaves_nothing_behind(when):
    """In the forward, the pass to the heads, and the two runs of the backward pass."""
    model = Model()
    model.checkpoints, runs = True, itertools.count(1)

    def fail(x):
        if next(runs) == when:
            raise KeyError("mine")
        return x.clone()

    model.blocks[1].extra = fail
    with pytest.raises(KeyError, match="mine"):
        gradients(model, logits_and_loss(model)[1])
    assert not open_attachments()
    assert not function_modes()
    model.blocks[1].extra = lambda x: x
    assert_as_without(model, 3)


def test_a_block_that_gives_its_input_back():
    """Nothing is recorded, as of a block without a gradient."""
    model = Model()
    model.blocks[1].extra = lambda x: x.detach()
    assert_as_without(model, layers="last")
