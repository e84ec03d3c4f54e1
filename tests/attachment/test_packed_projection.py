"""A foreign model's q, k and v that are views of one projection's output run on the packed operator, and no others."""

import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.attachment import packed_projection
from diversevit_fast.attachment.packed_projection import PackedAttention, may_pack, packed_attention
from tests.helpers.vits import images_for, timm_vit


def projected() -> torch.Tensor:
    return nn.Linear(5, 3 * 4 * 8)(torch.randn(2, 9, 5))


def as_timm(made):
    return made.reshape(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)


SPLITS = {
    "unbind": as_timm,
    "chunk": lambda x: tuple(y.view(2, 9, 4, 8).transpose(1, 2) for y in x.chunk(3, -1)),
    "index": lambda x: tuple(x.view(2, 9, 3, 4, 8)[:, :, i].transpose(1, 2) for i in range(3)),
}
OTHERS = {
    "detached": lambda x: tuple(y.detach() for y in as_timm(x)),
    "computed with": lambda x: tuple(y * 1 for y in as_timm(x)),
    "vkq": lambda x: tuple(reversed(as_timm(x))),
    "heads last": lambda x: x.reshape(2, 9, 3, 8, 4).permute(2, 0, 4, 1, 3).unbind(0),
    "head by head": lambda x: x.reshape(2, 9, 4, 3, 8).permute(3, 0, 2, 1, 4).unbind(0),
    "in place": lambda x: as_timm(x.view_as(x).clamp_(-9, 9)),
    "fewer queries": lambda x: (as_timm(x)[0][:, :, :1], *as_timm(x)[1:]),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_views_are_packed(split):
    """The same bits as of three tensors, and the kernel's own tensor as the projection's gradient."""
    made = projected()
    q, k, v = split(made)
    attend = packed_attention(made, q, k, v)
    assert attend is not None
    packed, three = attend(q, k, v, scale=0.3), dvf.attention(q, k, v, scale=0.3)
    assert torch.equal(packed, three)
    one, two = (
        torch.autograd.grad(y.sin().sum(), made, retain_graph=True)[0] for y in (packed, three)
    )
    assert torch.equal(one, two)
    assert "attention_qkvpacked" in type(packed.grad_fn.next_functions[0][0]).__name__


@pytest.mark.parametrize("split", OTHERS.values(), ids=OTHERS)
def test_anything_else_is_not(split):
    made = projected()
    assert packed_attention(made, *split(made)) is None


def test_without_gradients():
    made = projected()
    with torch.no_grad():
        assert packed_attention(made, *as_timm(made)) is None
    assert packed_attention(made.detach(), *as_timm(made.detach())) is None


@pytest.mark.parametrize("place", range(3))
def test_a_tensor_that_a_hook_looks_at_keeps_its_gradient(place):
    for look in (lambda x: x.register_hook(lambda g: None), lambda x: x.retain_grad()):
        made = projected()
        parts = as_timm(made)
        look(parts[place])
        assert packed_attention(made, *parts) is None


CHANGED = {
    "sliced": lambda q, k, v: (q[..., :1, :], k, v),
    "computed with": lambda q, k, v: (q * 1, k, v),
    "swapped": lambda q, k, v: (k, q, v),
    "of another": lambda q, k, v: (q, k, v.detach()),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_parts_changed_in_between_are_three_tensors(change):
    packed = PackedAttention(projected().view(2, 9, 3, 4, 8))
    q, k, v = change(*packed.parts)
    assert torch.equal(packed(q, k, v), dvf.attention(q, k, v))
    torch.autograd.grad(packed(q, k, v).sum(), q)


def test_a_mask_is_for_three_tensors():
    packed, mask = PackedAttention(projected().view(2, 9, 3, 4, 8)), torch.randn(9, 9)
    assert torch.equal(packed(*packed.parts, mask), dvf.attention(*packed.parts, mask))
    torch.manual_seed(0)
    found = packed(*packed.parts, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(found, dvf.attention(*packed.parts, dropout_p=0.5))


def _step(model, images):
    diversity = dvf.HeadDiversity(model, layers="all")
    with diversity:
        logits = model(images)
    loss = logits.square().sum() + diversity.penalty(logits)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert diversity._made is None
    return [g for g in grads if g is not None]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_stock_model(library, monkeypatch):
    """The same gradients as with three tensors, to the last bit."""
    if library == "timm":
        model = timm_vit()
        images = images_for(model)
    else:
        vit = pytest.importorskip("torchvision").models.VisionTransformer
        model = vit(32, 16, 2, 4, 24, 32, num_classes=3)
        images = torch.rand(2, 3, 32, 32)
    seen = []

    def watched(*qkv):
        seen.append(packed_attention(*qkv))
        return seen[-1]

    monkeypatch.setattr(packed_projection, "packed_attention", watched)
    got = _step(model, images)
    assert seen
    assert None not in seen
    monkeypatch.setattr(packed_projection, "packed_attention", lambda *_: None)
    assert all(map(torch.equal, got, _step(model, images)))


@pytest.mark.parametrize("attn_layer", [None, "ours"])
def test_a_hook_on_a_module_in_between_may_ask_for_its_gradient(attn_layer):
    """q and k, as a hook on timm's q_norm and k_norm is shown them, are differentiated in a context as outside."""
    from diversevit_fast.integrations.timm import Attention

    model = timm_vit(**({} if attn_layer is None else {"attn_layer": Attention}))
    images, shown = images_for(model), []
    attention = model.blocks[-1].attn
    assert may_pack(attention, [attention.qkv, attention.proj])
    for norm in (attention.q_norm, attention.k_norm):
        norm.register_forward_hook(lambda _, x, y: shown.append(y))
    assert not may_pack(attention, [attention.qkv, attention.proj])
    outside = torch.autograd.grad(model(images).sin().sum(), shown)
    shown.clear()
    with dvf.HeadDiversity(model, layers="all"):
        logits = model(images)
    inside = torch.autograd.grad(logits.sin().sum(), shown)
    for one, two in zip(inside, outside, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
