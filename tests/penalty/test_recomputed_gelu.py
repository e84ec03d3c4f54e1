"""What the penalty's graph keeps of GELUs is freed and computed again, and changes nothing."""

import contextlib

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import diversevit_fast as dvf
from diversevit_fast.penalty import recomputed_gelu

timm = pytest.importorskip("timm")

IMAGES, LABELS = (
    torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    torch.arange(2),
)


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, num_classes=2, **options
    ).train()


def gradients(model, around=contextlib.nullcontext):
    diversity = dvf.HeadDiversity(model, layers="all")
    with around():
        with diversity:
            logits = model(IMAGES)
        (F.cross_entropy(logits, LABELS) + 100 * diversity.penalty(logits)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def kept_instead(monkeypatch):
    monkeypatch.setattr(recomputed_gelu.RecomputedGelu, "free", lambda self, run, grad: None)


AUTOCAST = {
    "float32": contextlib.nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("dtype", AUTOCAST)
@pytest.mark.parametrize("act", [torch.nn.GELU, timm.layers.GELUTanh])
def test_gradients_are_the_same_bits(monkeypatch, act, dtype):
    ours = gradients(vit(act_layer=act), AUTOCAST[dtype])
    kept_instead(monkeypatch)
    for a, b in zip(ours, gradients(vit(act_layer=act), AUTOCAST[dtype]), strict=True):
        assert torch.equal(a, b)


def storages_after_penalty(model):
    """Whether what the second block's GELU returned, and the gradient of its input, are still in memory."""
    kept = {}

    def note(what, x):
        kept[what] = StorageWeakRef(x.untyped_storage())

    mlp = model.blocks[1].mlp
    mlp.act.register_forward_hook(lambda module, args, out: note("output", out))
    mlp.fc1.register_forward_hook(
        lambda module, args, out: out.register_hook(lambda g: note("gradient", g)) and None
    )
    diversity = dvf.HeadDiversity(model, layers="all")
    with diversity:
        logits = model(IMAGES)
    penalty = diversity.penalty(logits)
    alive = {what: not reference.expired() for what, reference in kept.items()}
    penalty.backward()
    return alive


def test_nothing_is_kept(monkeypatch):
    assert storages_after_penalty(vit()) == {"output": False, "gradient": False}
    kept_instead(monkeypatch)
    assert storages_after_penalty(vit()) == {"output": True, "gradient": True}


def test_overwritten_inputs_are_noticed():
    model, hidden = vit(), []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, out: hidden.append(out))
    diversity = dvf.HeadDiversity(model, layers="all")
    with diversity:
        logits = model(IMAGES)
    penalty = diversity.penalty(logits)
    with torch.no_grad():
        hidden[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(penalty, model.blocks[1].mlp.fc1.weight)


def test_leaves_other_hooks_on_saved_tensors_alone():
    for a, b in zip(
        gradients(vit(), torch.autograd.graph.save_on_cpu), gradients(vit()), strict=True
    ):
        assert torch.equal(a, b)


class Calls(TorchDispatchMode):
    """The names of our operators, as they are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "diversevit":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_layers_follow_one_another():
    """The gradient of a layer's penalty is used before the next layer's is computed."""
    model = vit(global_pool="avg")
    diversity = dvf.HeadDiversity(model, layers="all")
    with diversity:
        logits = model(IMAGES)
    penalty = diversity.penalty(logits)
    with Calls() as calls:
        penalty.backward()
    wanted = ["routed_head_penalty_backward", "attention_qkvpacked_double_backward"]
    assert [name for name in calls.names if name in wanted] == wanted * 3
