"""Contexts see torch calls from their first layer on, in the place among other modes that their block has."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import diversevit_fast as dvf
from diversevit_fast._torch_internals import function_modes
from diversevit_fast.attachment.torch_calls import open_attachments
from diversevit_fast.errors import UnsupportedError
from tests.helpers.vits import assert_same, diverse_vit, gradients, images_for, step, timm_vit


class Foreign(TorchFunctionMode):
    """A user's own mode, which changes nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MAKES = {
    "foreign": lambda model: Foreign(),
    "last": lambda model: dvf.HeadDiversity(model),
    "all": lambda model: dvf.HeadDiversity(model, layers="all", wrt="output"),
    "keep first": lambda model: dvf.keep_heads(model, {0: [0, 1]}),
    "keep last": lambda model: dvf.keep_heads(model, {-1: [0, 1]}),
    "capture": lambda model: dvf.capture_heads(model, layers=[1, 2]),
}
ORDERS = [
    ("last", "all"),
    ("all", "last"),
    ("last", "foreign"),
    ("foreign", "last"),
    ("keep last", "keep first"),
    ("capture", "last", "foreign", "all"),
    ("foreign", "last", "keep first", "foreign", "all"),
    ("last", "foreign", "capture", "foreign", "keep last"),
]


def owner_of(mode):
    return getattr(mode, "owner", mode)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: ", ".join(order))
def test_the_place_is_the_blocks_own(order):
    """In the last layer, which every context watches, the modes stand in the order of their blocks."""
    model = timm_vit().eval()
    images, seen = images_for(model), []
    model.blocks[-1].attn.q_norm.register_forward_hook(
        lambda *_: seen.extend(map(owner_of, function_modes()))
    )
    contexts = [MAKES[name](model) for name in order]
    watching = [
        context for context, name in zip(contexts, order, strict=True) if name != "keep first"
    ]
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        model(images)
        inside = [context for context in function_modes() if not hasattr(context, "owner")]
        assert inside == [x for x in contexts if isinstance(x, TorchFunctionMode)]
    assert [x for x in seen if x in watching] == watching
    assert function_modes() == []


@pytest.mark.parametrize("default", [False, True])
def test_a_device_chosen_inside(default):
    """PyTorch keeps a default device's mode below all others, and refuses to leave it anywhere else."""
    model = timm_vit()
    images, diversity = images_for(model), dvf.HeadDiversity(model)
    expect = step(model, diversity, images)[1]
    with diversity:
        if default:
            torch.set_default_device("cpu")
        with contextlib.nullcontext() if default else torch.device("cpu"), dvf.capture_heads(model):
            logits = model(images)
            assert function_modes()[default].owner is diversity
        if default:
            torch.set_default_device(None)
        assert [owner_of(mode) for mode in function_modes()] == [diversity]
    torch.testing.assert_close(diversity.penalty(logits), expect)


def test_inner_contexts_change_what_outer_ones_see():
    """Heads masked by an outer block are captured masked by an inner one, and not the other way round."""
    model = diverse_vit()
    images = images_for(model)
    for outer_masks in (True, False):
        keep, capture = dvf.keep_heads(model, {-1: [0]}), dvf.capture_heads(model, layers="last")
        with contextlib.ExitStack() as stack:
            for context in (keep, capture) if outer_masks else (capture, keep):
                stack.enter_context(context)
            model(images)
        assert (not capture[0][:, 1:].any()) == outer_masks


def modes_at(model):
    """How many modes are entered when each block starts, and at the end of the forward."""
    counts = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: counts.append(len(function_modes())))
    return counts


def test_nothing_is_seen_below_the_first_layer():
    model = timm_vit()
    counts, images = modes_at(model), images_for(model)
    diversity = dvf.HeadDiversity(model, layers=[1])
    for _ in range(2):
        with diversity:
            assert function_modes() == []
            logits = model(images)
            assert len(function_modes()) == 1
        assert function_modes() == []
        assert counts == [0, 0, 1]
        counts.clear()
        assert diversity.penalty(logits) > 0


def test_only_layers_are_seen_where_nothing_else_is_replaced():
    model = timm_vit()
    counts, images = modes_at(model), images_for(model)
    with dvf.capture_heads(model, layers="all"), dvf.keep_heads(model, {0: [0], 1: [1]}):
        model(images)
        assert function_modes() == []
    assert counts == [0, 0, 0]


def test_several_forwards_in_one_block():
    model = timm_vit()
    counts, images = modes_at(model), images_for(model)
    diversity = dvf.HeadDiversity(model)
    with diversity:
        logits = torch.cat([model(images), model(images)])
    assert counts == [0, 0, 0, 1, 1, 1]
    twice = diversity.penalty(logits)
    torch.testing.assert_close(twice, step(model, diversity, images)[1])


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).double().eval()


@pytest.mark.parametrize("layer", [0, 1])
def test_the_fast_path_of_an_encoder_is_not_taken(layer):
    """In eval mode, without gradients, PyTorch's encoder layer calls its attention only if torch calls are seen."""
    model, x = encoder(), torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
        with dvf.keep_heads(model, {layer: [0]}), dvf.capture_heads(model, layers=[layer]) as heads:
            masked = model(x)
    assert not heads[0][:, 1:].any()
    with dvf.keep_heads(model, {layer: [0]}):
        expect = model(x)  # with gradients there is no fast path
    torch.testing.assert_close(masked, expect)
    assert (masked - plain).abs().max() > 1e-3


def block_of(context, forward):
    """A block that is open while a generator waits."""
    with context:
        yield forward()


def test_blocks_that_end_out_of_order():
    """The first to begin ends first: the other goes on, and nothing is left behind."""
    model = diverse_vit()
    images = images_for(model)
    expect = gradients(model, step(model, dvf.HeadDiversity(model), images)[1])
    first, second = dvf.HeadDiversity(model), dvf.HeadDiversity(model)
    one, two = (block_of(context, lambda: model(images)) for context in (first, second))
    next(one)
    logits = next(two)
    one.close()
    assert [owner_of(mode) for mode in function_modes()] == [second]
    assert open_attachments() == [second]
    two.close()
    assert function_modes() == open_attachments() == []
    assert_same(gradients(model, second.penalty(logits)), expect)


@pytest.mark.parametrize("context", ["last", "keep last", "capture"])
def test_an_exception_inside_the_layer(context):
    model = timm_vit()
    images, made = images_for(model), MAKES[context](model)
    handle = model.blocks[-1].attn.q_norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), made:
        model(images)
    assert function_modes() == open_attachments() == []
    handle.remove()
    with made:
        model(images)


def test_a_caught_exception_inside_the_block():
    """The context goes on, as if the failed forward had not been."""
    model = timm_vit()
    images, diversity = images_for(model), dvf.HeadDiversity(model)
    expect = step(model, diversity, images)[1]
    with diversity:
        handle = model.blocks[-1].attn.q_norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(images)
        handle.remove()
        logits = model(images)
    torch.testing.assert_close(diversity.penalty(logits), expect)


def test_another_thread_has_modes_of_its_own():
    model, seen = timm_vit(), []
    images = images_for(model)

    def forward():
        model(images)
        seen.extend([function_modes(), open_attachments()])

    with dvf.HeadDiversity(model) as diversity:
        logits = model(images)
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        assert open_attachments() == [diversity]
    assert seen == [[], []]
    assert diversity.penalty(logits) > 0


def test_an_open_block_is_known_before_a_layer_runs():
    model = diverse_vit()
    with dvf.keep_heads(model, {0: [0]}), dvf.HeadDiversity(model, every=2) as diversity:
        assert [type(x).__name__ for x in open_attachments()] == ["keep_heads", "HeadDiversity"]
        with pytest.raises(UnsupportedError, match="inside `with keep_heads`"):
            dvf.prune_heads(model, {0: [0]})
    with diversity:  # left out by ``every``
        assert open_attachments() == []
