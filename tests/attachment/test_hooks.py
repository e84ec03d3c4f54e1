"""A user's hooks and modules run inside every context on the same values as outside, or are refused."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import diversevit_fast as dvf
from diversevit_fast.attachment.attention_modules import attention_layers
from diversevit_fast.errors import UnsupportedError
from diversevit_fast.heads.prefix_cache import PrefixCache
from tests.attachment.test_zoo import made
from tests.helpers.vits import assert_same, gradients, images_for, step, timm_vit
from tests.helpers.zoo import ZOO

WATCHED = ("attn_drop", "softmax")


def unfused(model):
    """The model as after ``timm.layers.set_fused_attn(False)``."""
    for module in model.modules():
        if "fused_attn" in vars(module):
            module.fused_attn = False
    return model


def children(layer):
    found = (getattr(layer.module, name, None) for name in WATCHED)
    return [child for child in found if isinstance(child, nn.Module)]


class Seen:
    """Records what forward, pre-forward and backward hooks on some modules are called with."""

    def __init__(self, modules):
        self.forward, self.backward, self.handles = [], [], []
        for module in modules:
            self.handles += [
                module.register_forward_pre_hook(lambda _, x: self.forward.append(x[0])),
                module.register_forward_hook(lambda _, x, y: self.forward.append(y)),
                module.register_full_backward_pre_hook(lambda _, g: self.backward.append(g[0])),
                module.register_full_backward_hook(lambda _, g, h: self.backward.append(h[0])),
            ]

    def clear(self):
        taken = [list(self.forward), list(self.backward)]
        self.forward.clear()
        self.backward.clear()
        return taken

    def remove(self):
        for handle in self.handles:
            handle.remove()


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def every_head(model, layer):
    return dvf.keep_heads(model, {layer.index: range(layer.num_heads)})


CONTEXTS = {
    "keep": every_head,
    "capture": lambda model, layer: dvf.capture_heads(model, layers=layer.index),
    "output": lambda model, layer: dvf.HeadDiversity(model, layers=layer.index, wrt="output"),
    "input": lambda model, layer: dvf.HeadDiversity(model, layers=layer.index),
}
USES = {"keep": "mask", "input": "wrt='input'"}
UNFUSED = [name for name, entry in ZOO.items() if entry.library == "timm"]
UNFUSED.remove("timm CaiT, talking heads")  # which no context takes


@pytest.mark.parametrize("name", UNFUSED)
def test_hooks_on_what_only_unfused_attention_calls(name):
    entry, model, images, layer = made(name)
    unfused(model)
    if not children(layer):
        pytest.skip("nothing to hook")
    seen = Seen(children(layer))
    expect = entry.logits(model(images))
    expect.sin().sum().backward()
    theirs = seen.clear()
    assert theirs[0]
    assert theirs[1]
    for key, make in CONTEXTS.items():
        if USES.get(key, "wrt='output'") in entry.refused:
            continue
        context = make(model, layer)
        with context:
            logits = entry.logits(model(images))
            torch.testing.assert_close(logits, expect, rtol=1e-9, atol=1e-10)
            if logits.requires_grad:
                logits.sin().sum().backward()
        ours = seen.clear()
        same(ours[0], theirs[0])
        same(ours[1], theirs[1])


def calls_of(model, entry, images, around):
    """(module, output or gradient) of hooks on every module, in one forward and backward."""
    names = {module: name for name, module in model.named_modules()}
    forward, backward, handles = [], [], []

    def note(module, _, output):
        tensors = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        forward.extend((names[module], x) for x in tensors)

    def note_gradient(module, _, gradients):
        backward.extend((names[module], g) for g in gradients if g is not None)

    for module, name in names.items():
        if not name.endswith("rel_pos"):  # refused, see below
            handles.append(module.register_forward_hook(note))
        if isinstance(module, (nn.Linear, nn.Dropout, nn.Softmax)):
            handles.append(module.register_full_backward_hook(note_gradient))
    torch.manual_seed(0)  # ViT-MAE shuffles its patches
    with around:
        logits = entry.logits(model(images))
        logits.sin().sum().backward()
    for handle in handles:
        handle.remove()
    return forward, sorted(backward, key=lambda pair: pair[0])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ZOO)
def test_every_hook_of_every_library(name):
    entry, model, images, layer = made(name)
    unfused(model)
    expect = calls_of(model, entry, images, contextlib.nullcontext())
    assert min(map(len, expect)) > 3
    for key, make in CONTEXTS.items():
        if USES.get(key, "wrt='output'") in entry.refused:
            continue
        ours = calls_of(model, entry, images, make(model, layer))
        for mine, theirs in zip(ours, expect, strict=True):
            assert [module for module, _ in mine] == [module for module, _ in theirs]
            same([x for _, x in mine], [x for _, x in theirs])


@pytest.mark.parametrize("wrt", ["input", "output"])
@pytest.mark.parametrize("name", ["timm ViT", "timm BEiT", "timm Swin", "timm EVA-02"])
def test_penalty_of_a_watched_layer(name, wrt):
    """Value and gradients are those without a hook, and differ with a hook that changes something."""
    _, model, images, layer = made(name)
    unfused(model)

    def penalty():
        return step(model, dvf.HeadDiversity(model, layers=layer.index, wrt=wrt), images)[1]

    expect = penalty()
    grads = gradients(model, expect)
    child, shapes = children(layer)[-1], []
    handle = child.register_forward_hook(lambda _, x, y: shapes.append(y.shape))
    ours = penalty()
    assert len(shapes) == 1
    torch.testing.assert_close(ours, expect, rtol=1e-9, atol=0)
    assert_same(gradients(model, ours), grads)
    handle.remove()
    child.register_forward_hook(lambda _, x, y: y.tril())
    assert (penalty() - expect).abs() > 1e-6


@pytest.mark.parametrize("change", ["hook", "module", "softmax", "forward", "globally"])
def test_what_changes_the_weights_changes_the_logits(change):
    entry, model, images, layer = made("timm Swin")
    unfused(model)
    plain, attention, handles = entry.logits(model(images)), layer.module, []

    class Lower(nn.Module):
        def forward(self, x):
            return x.tril()

    if change == "hook":
        attention.attn_drop.register_forward_hook(lambda _, x, y: y.tril())
    elif change == "module":
        attention.attn_drop = Lower()
    elif change == "softmax":
        attention.softmax = nn.Sequential(nn.Softmax(-1), Lower())
    elif change == "forward":
        attention.attn_drop.forward = lambda x: x.tril()
    else:

        def lower(module, x, y):
            return y.tril() if module is attention.attn_drop else None

        handles.append(nn.modules.module.register_module_forward_hook(lower))
    try:
        expect = entry.logits(model(images))
        assert (expect - plain).abs().max() > 1e-3
        for make in CONTEXTS.values():
            with make(model, layer):
                torch.testing.assert_close(entry.logits(model(images)), expect)
    finally:
        for handle in handles:
            handle.remove()


def test_dropout_that_is_on_by_itself():
    """Monte Carlo dropout: the modules are in training mode, the model is not."""
    model = unfused(timm_vit(attn_drop_rate=0.5)).eval()
    images = images_for(model)
    for block in model.blocks:
        block.attn.attn_drop.train()
    (layer, *_) = attention_layers(model)
    torch.manual_seed(3)
    expect = model(images)
    for make in (CONTEXTS["keep"], CONTEXTS["capture"], CONTEXTS["output"]):
        with make(model, layer):
            torch.manual_seed(3)
            torch.testing.assert_close(model(images), expect)
    torch.manual_seed(4)
    assert (model(images) - expect).abs().max() > 1e-4


def test_fused_attention_calls_no_hook_inside_as_outside():
    model = timm_vit()
    seen = Seen([model.blocks[-1].attn.attn_drop])
    model(images_for(model))
    for make in CONTEXTS.values():
        with make(model, attention_layers(model)[-1]):
            model(images_for(model))
    assert seen.clear() == [[], []]


def test_the_hooked_position_bias_is_refused():
    _, model, images, layer = made("timm relpos")
    unfused(model)
    layer.module.rel_pos.register_forward_hook(lambda *_: None)
    with (
        dvf.HeadDiversity(model),
        pytest.raises(UnsupportedError, match="hook on its rel_pos") as failure,
    ):
        model(images)
    assert "\n" not in str(failure.value)


def test_attn_layer():
    """``integrations.timm.Attention`` runs unfused where it is watched, in a context and outside."""
    from diversevit_fast.integrations.timm import Attention

    stock, ours = unfused(timm_vit()), unfused(timm_vit(attn_layer=Attention))
    ours.load_state_dict(stock.state_dict())
    images, layer = images_for(ours), attention_layers(ours)[-1]
    seen = [Seen([model.blocks[-1].attn.attn_drop]) for model in (stock, ours)]
    torch.testing.assert_close(ours(images), stock(images))
    theirs = seen[0].clear()[0]
    same(seen[1].clear()[0], theirs)
    for make in CONTEXTS.values():
        with make(ours, layer):
            ours(images)
        same(seen[1].clear()[0], theirs)


@pytest.mark.parametrize("kind", ["backward", "backward pre"])
def test_backward_hooks_see_every_token(kind):
    """With a hook the class-token shortcut is not taken."""
    model = timm_vit()
    images, shapes = images_for(model), []
    block = model.blocks[-1]
    if kind == "backward":
        block.register_full_backward_hook(lambda _, g, h: shapes.append(h[0].shape))
    else:
        block.register_full_backward_pre_hook(lambda _, g: shapes.append(g[0].shape))
    logits, penalty = step(model, dvf.HeadDiversity(model), images)
    (logits.sum() + penalty).backward()
    model(images).sum().backward()
    assert len(set(shapes)) == 1
    assert len(shapes) >= 2
    assert shapes[0][1] == 5


def test_the_prefix_cache_shows_hooks_every_forward():
    model = unfused(timm_vit(num_heads=4)).eval()
    layer, images = attention_layers(model)[1], images_for(model)
    calls, watch = [], model.blocks[1].attn
    watch.attn_drop.register_forward_hook(lambda *_: calls.append("attn_drop"))
    watch.q_norm.register_forward_hook(lambda *_: calls.append("q_norm"))
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: calls.append("below"))
    with PrefixCache(model, [layer]) as cache:
        outputs = list(cache.outputs([{1: [h]} for h in range(4)], images))
    for name in ("attn_drop", "q_norm", "below"):
        assert calls.count(name) == 4
    for head, output in enumerate(outputs):
        with torch.no_grad(), dvf.keep_heads(model, {1: [head]}):
            torch.testing.assert_close(output, model(images))
