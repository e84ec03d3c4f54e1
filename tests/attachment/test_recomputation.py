"""Activation checkpointing of what a context observes: the gradients are those without it."""

import gc
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast._torch_internals import function_modes
from diversevit_fast.attachment.torch_calls import open_attachments
from diversevit_fast.errors import UnsupportedError
from tests.helpers.vits import assert_same, diverse_vit, gradients, images_for, labels_for, timm_vit


def loss_of(model, *others, inside=False, calls=1, **options):
    """Cross-entropy plus penalty; ``inside``: computed while the block is open."""
    diversity = dvf.HeadDiversity(model, **options)
    images = images_for(model)
    with ExitStack() as stack:
        for context in (*others, diversity):
            stack.enter_context(context)
        outputs = [model(images) for _ in range(calls)]
        logits = torch.cat(outputs)
        if inside:
            penalty = diversity.penalty(logits)
    if not inside:
        penalty = diversity.penalty(logits)
    return F.cross_entropy(logits, labels_for(images).repeat(calls)) + 100 * penalty


def checkpointed(model, names):
    """``model`` with the forwards of the modules named run by non-reentrant checkpoints."""
    for name in names:
        module = model.get_submodule(name)
        module.forward = _checkpointed(module.forward)
    return model


def _checkpointed(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


PLACES = {
    "blocks": ("blocks.0", "blocks.1", "blocks.2"),
    "the last block": ("blocks.2",),
    "modules around attention": ("blocks.1.mlp", "blocks.2.mlp", "blocks.2.norm1", "norm"),
    "inside attention": ("blocks.1.attn.qkv", "blocks.2.attn.proj"),
    "nested": ("blocks.1", "blocks.1.mlp", "blocks.2", "blocks.2.mlp"),
}


@pytest.mark.parametrize("wrt", ["input", "output"])
@pytest.mark.parametrize("layers", ["last", "all", [0], [1]], ids=str)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_any_part_of_the_model(place, layers, wrt):
    if "blocks.1.attn.qkv" in place and wrt == "output":
        layers = "last"
    model, expect = timm_vit(), timm_vit()
    wanted = gradients(expect, loss_of(expect, layers=layers, wrt=wrt))
    checkpointed(model, place)
    assert_same(gradients(model, loss_of(model, layers=layers, wrt=wrt)), wanted)
    assert not function_modes()
    assert not open_attachments()


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("frozen", [False, True])
def test_timms_own_switch(layers, pool, frozen):
    model = timm_vit(global_pool=pool).train()
    if frozen:
        model.requires_grad_(False).head.requires_grad_(True)
        model.blocks[2].requires_grad_(True)
    wanted = gradients(model, loss_of(model, layers=layers))
    model.set_grad_checkpointing()
    assert_same(gradients(model, loss_of(model, layers=layers)), wanted)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("layers", ["last", "all"])
def test_transformers_own_switch(layers):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.0,
    )

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = transformers.ViTForImageClassification(config)

        def forward(self, images):
            return self.whole(images).logits

    model = Logits().double().train()
    wanted = gradients(model, loss_of(model, layers=layers))
    model.whole.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert_same(gradients(model, loss_of(model, layers=layers)), wanted)


def test_the_whole_model():
    """In one checkpoint, the class-token shortcut included."""
    for make in (timm_vit, diverse_vit):
        model = make()
        wanted = gradients(model, loss_of(model))
        model.forward = _checkpointed(model.forward)
        assert_same(gradients(model, loss_of(model)), wanted)


@pytest.mark.parametrize("checkpoint_blocks", [True, False])
@pytest.mark.parametrize("layers", ["last", "all", [1]], ids=str)
def test_the_whole_model_and_its_blocks(layers, checkpoint_blocks):
    """In the outer checkpoint's first moments an inner one runs."""
    model = timm_vit().train()
    wanted = gradients(model, loss_of(model, layers=layers))
    model.set_grad_checkpointing()
    model.forward = _checkpointed(model.forward)
    options = {"layers": layers, "checkpoint_blocks": checkpoint_blocks}
    assert_same(gradients(model, loss_of(model, **options)), wanted)


def test_with_other_contexts():
    model = timm_vit().train()

    def contexts():
        return dvf.second_order(), dvf.keep_heads(model, {1: [0, 2]}), dvf.capture_heads(model)

    wanted = gradients(model, loss_of(model, *contexts(), layers=[1, 2]))
    model.set_grad_checkpointing()
    assert_same(gradients(model, loss_of(model, *contexts(), layers=[1, 2])), wanted)


def test_captured_heads_are_differentiated_twice():
    model = timm_vit().train()
    images = images_for(model)

    def loss():
        with dvf.second_order(), dvf.capture_heads(model) as heads:
            logits = model(images)
        inner = torch.autograd.grad(logits.pow(3).sum(), list(heads), create_graph=True)
        return sum(g.square().sum() for g in inner) + sum(h.sin().sum() for h in heads)

    wanted = gradients(model, loss())
    model.set_grad_checkpointing()
    assert_same(gradients(model, loss()), wanted)


def test_gradients_taken_inside_the_block():
    """The block that is open does not see what is recomputed."""
    model = timm_vit().train()
    wanted = gradients(model, loss_of(model, layers="all"))
    model.set_grad_checkpointing()
    assert_same(gradients(model, loss_of(model, layers="all", inside=True)), wanted)
    images, diversity = images_for(model), dvf.HeadDiversity(model, layers="all")
    with diversity:
        logits = model(images)
        loss = F.cross_entropy(logits, labels_for(images)) + 100 * diversity.penalty(logits)
        assert_same(gradients(model, loss), wanted)
        again = model(images)
        second = diversity.penalty(again)
    torch.testing.assert_close(loss, F.cross_entropy(again, labels_for(images)) + 100 * second)


def test_gradients_taken_inside_another_block():
    model = timm_vit().train()
    wanted = gradients(model, loss_of(model, layers="all"))
    model.set_grad_checkpointing()
    loss = loss_of(model, layers="all")
    with dvf.capture_heads(model) as heads:
        assert_same(gradients(model, loss), wanted)
        model(images_for(model))
    assert len(heads) == 3


def test_gradients_taken_on_another_thread():
    """As on a GPU, where autograd has threads of its own."""
    model = timm_vit().train()
    wanted = gradients(model, loss_of(model, layers="all"))
    model.set_grad_checkpointing()
    loss, found = loss_of(model, layers="all"), []
    thread = threading.Thread(target=lambda: found.extend(gradients(model, loss)))
    thread.start()
    thread.join()
    assert_same(found, wanted)


def test_forwards_that_were_bound_inside_the_block():
    """Of a class that the module has no longer when it is recomputed."""
    model = timm_vit(global_pool="avg", class_token=False)
    wanted = gradients(model, loss_of(model, layers="all"))
    block = model.blocks[1]

    def forward(x):
        x = x + checkpoint(block.attn.forward, block.norm1(x), use_reentrant=False)
        return x + checkpoint(block.mlp.forward, block.norm2(x), use_reentrant=False)

    block.forward = forward
    assert_same(gradients(model, loss_of(model, layers="all")), wanted)


def test_several_forwards_and_several_backwards():
    model = timm_vit().train()
    wanted = gradients(model, loss_of(model, layers="all", calls=2))
    model.set_grad_checkpointing()
    loss = loss_of(model, layers="all", calls=2)
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
    for _ in range(2):
        assert_same(torch.autograd.grad(loss, parameters, retain_graph=True), wanted)


def test_dropout_is_drawn_again_as_it_was():
    model = timm_vit(proj_drop_rate=0.2, global_pool="avg", class_token=False).train()

    def seeded():
        torch.manual_seed(3)
        return gradients(model, loss_of(model, layers="all"))

    wanted = seeded()
    model.set_grad_checkpointing()
    assert_same(seeded(), wanted)


def test_steps_left_out_and_no_grad():
    model = timm_vit().train()
    model.set_grad_checkpointing()
    images = images_for(model)
    diversity = dvf.HeadDiversity(model, layers="all", every=2)
    values = []
    for _ in range(4):
        with diversity:
            logits = model(images)
        values.append(diversity.penalty(logits).item())
        logits.sum().backward()
    assert values[0] == values[2] > 0 == values[1] == values[3]
    assert diversity.step == 4
    with torch.no_grad(), diversity:
        model(images)


@pytest.mark.parametrize("place", [("blocks.2",), ("blocks.2.mlp",)], ids=str)
def test_drawn_samples_are_refused(place):
    """They would be drawn anew."""
    model = checkpointed(timm_vit(global_pool="avg", class_token=False), place)
    with pytest.raises(UnsupportedError, match="use fraction=1"):
        loss_of(model, fraction=0.5)


def test_drawn_samples_above_checkpointed_blocks():
    model = timm_vit(global_pool="avg", class_token=False)

    def seeded():
        torch.manual_seed(1)
        return gradients(model, loss_of(model, fraction=0.5))

    wanted = seeded()
    checkpointed(model, ("blocks.0", "blocks.1"))
    assert_same(seeded(), wanted)


def test_nothing_is_kept_alive():
    """A graph that is dropped without a gradient goes, and with it the context."""
    model = timm_vit().train()
    model.set_grad_checkpointing()
    diversity = dvf.HeadDiversity(model, layers="all")
    with diversity:
        logits = model(images_for(model))
    heads = weakref.ref(diversity), weakref.ref(logits)
    del diversity, logits
    gc.collect()
    assert [ref() for ref in heads] == [None, None]


def test_less_is_kept_for_backward():
    """Of a graph, by hooks on what it saves: with checkpoints a fraction, until gradients are taken."""

    def saved(model):
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        diversity = dvf.HeadDiversity(model, layers="all")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), diversity:
            model(images_for(model))
        return sum(sizes.values())

    model = timm_vit().train()
    whole = saved(model)
    model.set_grad_checkpointing()
    assert saved(model) < whole / 2
