"""The end of a forward as one node of autograd's graph: the same numbers, and only where all of it is known."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.attachment import class_token
from tests.helpers.vits import Calls, assert_same, gradients, images_for, labels_for, step, timm_vit


def ends(monkeypatch, model, images=None, around=nullcontext, **options):
    """How often a regularised forward ends early; what comes of it."""
    seen = []
    original = class_token.vit_end
    with monkeypatch.context() as patch:
        patch.setattr(class_token, "vit_end", lambda *a: seen.append(1) or original(*a))
        with around():
            images = images_for(model) if images is None else images
            made = step(model, dvf.HeadDiversity(model, **options), images)
    return len(seen), made


def numbers(model, images, **options):
    """Logits, penalty and gradients of a loss with it."""
    logits, penalty = step(model, dvf.HeadDiversity(model, **options), images)
    loss = F.cross_entropy(logits, labels_for(images)) + 100 * penalty
    return [logits, penalty, *gradients(model, loss)]


OPTIONS = [
    {},
    {"layers": "all"},
    {"layers": [0, 2], "granularity": "sample", "reduction": "pairs"},
    {"target": "probability"},
    {"target": lambda logits: logits.tanh().sum(-1), "grad_scale": 4.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("frozen", ["", "blocks.2", "head", "blocks.0"])
def test_same_numbers_as_by_the_modules(monkeypatch, options, frozen):
    model = timm_vit()
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or not name.startswith(frozen))
    images = images_for(model)
    assert ends(monkeypatch, model, **options)[0] == 1
    ours = numbers(model, images, **options)
    monkeypatch.setattr(class_token, "may_end", lambda x: False)
    assert ends(monkeypatch, model, **options)[0] == 0
    assert_same(ours, numbers(model, images, **options))


def test_float32_and_bfloat16_are_as_near_as_by_the_modules(monkeypatch):
    """To the float64 numbers."""
    exact = numbers(timm_vit(), images_for(timm_vit()))
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        errors = []
        for allowed in (True, False):
            with monkeypatch.context() as patch:
                if not allowed:
                    patch.setattr(class_token, "may_end", lambda x: False)
                model = timm_vit().to(dtype)
                images = images_for(model).to(dtype)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    assert ends(patch, model, images)[0] == allowed
                    made = numbers(model, images)
                of = zip(made, exact, strict=True)
                errors.append(sum(float((a - b).detach().norm()) for a, b in of))
        ours, theirs = errors
        assert ours <= 1.5 * theirs


@pytest.mark.parametrize("forward", [True, False])
def test_autocast_of_the_forward_or_of_the_gradients_alone(monkeypatch, forward):
    model = timm_vit().float()
    images, diversity = images_for(model).float(), dvf.HeadDiversity(model)

    def cast(enabled):
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    made = []
    for allowed in (True, False):
        if not allowed:
            monkeypatch.setattr(class_token, "may_end", lambda x: False)
        with cast(forward), diversity:
            logits = model(images)
        with cast(not forward):
            loss = F.cross_entropy(logits.float(), labels_for(images)) + 100 * diversity.penalty(
                logits
            )
            made.append([loss.detach(), *gradients(model, loss)])
    for mine, theirs in zip(*made, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(
            mine, theirs, rtol=0.1, atol=0.02 * float(theirs.abs().max()) + 1e-6
        )


def without_bias(model):
    model.blocks[-1].attn.proj.bias = None


def patched_class(model):
    class Another(type(model)):
        def forward_head(self, x, pre_logits=False):
            return super().forward_head(x, pre_logits) + 1

    model.__class__ = Another


def patched_instance(model):
    model.forward_head = lambda x: type(model).forward_head(model, x) + 1


def hooked_head(model):
    model.head.register_forward_hook(lambda module, args, out: out + 1)


def another_head(model):
    model.head = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 5)).double()


def another_norm(model):
    model.fc_norm = nn.LayerNorm(24).double()


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.head)


def dropping_head(model):
    model.head_drop.p = 0.5


def patched_norm(model):
    forward = model.norm.forward
    model.norm.forward = lambda x: forward(x) + 1


CHANGES = [
    *(without_bias, patched_class, patched_instance, hooked_head, another_head, another_norm),
    *(parametrized, dropping_head, patched_norm),
]


@pytest.mark.parametrize("change", CHANGES)
def test_not_past_what_is_not_known(monkeypatch, change):
    model = timm_vit()
    change(model)
    if change is not dropping_head:
        expect = model(images_for(model))
        count, (logits, _) = ends(monkeypatch, model)
        torch.testing.assert_close(logits, expect)
    else:
        count, _ = ends(monkeypatch, model)
    assert count == 0


@pytest.mark.parametrize(
    "make",
    [{"init_values": 0.5}, {"proj_drop_rate": 0.1}, {"drop_path_rate": 0.1}, {"num_classes": 0}],
    ids=str,
)
def test_not_with_modules_that_do_more(monkeypatch, make):
    assert ends(monkeypatch, timm_vit(**make))[0] == 0


def test_dropout_that_is_off_is_nothing(monkeypatch):
    assert ends(monkeypatch, timm_vit(proj_drop_rate=0.1, drop_rate=0.1).eval())[0] == 1


@pytest.mark.parametrize("options", [{"wrt": "output"}, {"fraction": 0.5}], ids=str)
def test_not_where_more_is_seen(monkeypatch, options):
    assert ends(monkeypatch, timm_vit(), **options)[0] == 0


def test_not_where_somebody_watches_calls(monkeypatch):
    model = timm_vit()
    expect = model(images_for(model))
    for around in (Calls, lambda: torch.device("cpu"), lambda: dvf.use_backend("reference")):
        count, (logits, _) = ends(monkeypatch, model, around=around)
        assert count == 0
        torch.testing.assert_close(logits, expect)


def test_checkpoints_save_what_they_recompute(monkeypatch):
    model, images = timm_vit(), images_for(timm_vit())
    expect = numbers(model, images)
    diversity = dvf.HeadDiversity(model)
    with diversity:
        logits = checkpoint(model, images, use_reentrant=False)
    penalty = diversity.penalty(logits)
    loss = F.cross_entropy(logits, labels_for(images)) + 100 * penalty
    assert_same([logits, penalty, *gradients(model, loss)], expect)


def test_features_and_what_follows_the_model_are_as_ever(monkeypatch):
    model, images = timm_vit(), images_for(timm_vit())
    diversity = dvf.HeadDiversity(model)
    with diversity:
        assert model.forward_features(images).shape == (3, 5, 24)
        logits = model(images)
        after = F.layer_norm(logits, (5,))
    assert "layer_norm" in type(after.grad_fn).__name__
    assert type(logits.grad_fn).__name__ == "_EndBackward"


def test_the_graph_is_freed():
    model = timm_vit()
    logits, penalty = step(model, dvf.HeadDiversity(model), images_for(model))
    node = weakref.ref(logits.grad_fn)
    gc.disable()
    try:
        (logits.sum() + penalty).backward()
        del logits, penalty
        assert node() is None
    finally:
        gc.enable()


def test_an_error_in_the_forward_leaves_the_block_clean():
    model = timm_vit()
    diversity = dvf.HeadDiversity(model)
    expect, _ = step(model, diversity, images_for(model))
    with pytest.raises(AssertionError), diversity:
        model(torch.zeros(3, 3, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(step(model, diversity, images_for(model))[0], expect)
