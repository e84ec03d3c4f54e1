"""Every use of every library's attention is exact to rounding, or refused in one line."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.attachment.attention_modules import choose_layers
from diversevit_fast.errors import UnsupportedError
from tests.helpers.eager import Eager, eager_penalty
from tests.helpers.vits import assert_same, gradients
from tests.helpers.zoo import ZOO

PACKAGES = {"transformers": "transformers", "torchvision": "torchvision", "open_clip": "open_clip"}


def made(name):
    """A model, images, and its chosen attention layer."""
    entry = ZOO[name]
    if entry.library in PACKAGES:
        pytest.importorskip(PACKAGES[entry.library])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = entry.make().double().eval()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():  # initial weights are often zero or tiny
            p += 0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    g = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, entry.side, entry.side, generator=g, dtype=torch.float64)
    return entry, model, images, choose_layers(model, entry.layers)[0]


def right_or_refused(record, entry, use, context):
    """Return True if ``use`` is allowed; otherwise assert that it is refused in one line."""
    record("use", use)
    record("outcome", "refused" if use in entry.refused else "right")
    if use not in entry.refused:
        return True
    with pytest.raises(UnsupportedError) as failure:
        context()
    assert "\n" not in str(failure.value)
    assert use in str(failure.value)
    return False


@pytest.mark.parametrize("wrt", ["input", "output"])
@pytest.mark.parametrize("name", ZOO)
def test_penalty(name, wrt, record_property):
    """Value, logits and every parameter's gradient against one VJP per head."""
    entry, model, images, layer = made(name)
    record_property("model", name)

    def diversity():
        return dvf.HeadDiversity(model, layers=entry.layers, wrt=wrt)

    if not right_or_refused(record_property, entry, f"wrt={wrt!r}", diversity):
        return
    context = diversity()
    with context:
        logits = entry.logits(model(images))
    penalty = context.penalty(logits)
    expect_logits, expect = eager_penalty(model, images, layer.module, wrt, entry.logits)
    torch.testing.assert_close(logits, expect_logits, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(penalty, expect, rtol=1e-7, atol=1e-12)
    labels = torch.arange(len(images))
    ours = gradients(model, F.cross_entropy(logits, labels) + 100 * penalty)
    assert_same(ours, gradients(model, F.cross_entropy(expect_logits, labels) + 100 * expect))
    plain = gradients(model, F.cross_entropy(entry.logits(model(images)), labels))
    assert max((a - b).abs().max() for a, b in zip(ours, plain, strict=True)) > 1e-6


@pytest.mark.parametrize("name", ZOO)
def test_mask(name, record_property):
    """Heads multiplied by zero, and seen by ``capture_heads``."""
    entry, model, images, layer = made(name)
    record_property("model", name)
    kept = {layer.index: [0]}
    if not right_or_refused(record_property, entry, "mask", lambda: dvf.keep_heads(model, kept)):
        return
    scale = torch.zeros(layer.num_heads, dtype=torch.float64)
    scale[0] = layer.num_heads
    with torch.no_grad():
        with dvf.keep_heads(model, kept):
            masked = entry.logits(model(images))
        with Eager(layer.module, scale):
            expect = entry.logits(model(images))
        plain = entry.logits(model(images))
    torch.testing.assert_close(masked, expect, rtol=1e-8, atol=1e-8)
    assert (masked - plain).abs().max() > 1e-6


@pytest.mark.parametrize("name", ZOO)
def test_prune(name, record_property):
    """Fewer parameters, the outputs of the mask; the model is as it was where that is refused."""
    entry, model, images, layer = made(name)
    record_property("model", name)
    kept = {layer.index: [0, 2]}
    before = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if not right_or_refused(record_property, entry, "prune", lambda: dvf.prune_heads(model, kept)):
        assert {n: tuple(p.shape) for n, p in model.named_parameters()} == before
        return
    with torch.no_grad(), dvf.keep_heads(model, kept):
        expect = entry.logits(model(images))
    pruned = dvf.prune_heads(copy.deepcopy(model), kept)
    with torch.no_grad():
        torch.testing.assert_close(entry.logits(pruned(images)), expect, rtol=1e-8, atol=1e-8)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (pruned, model)]
    assert sizes[0] < sizes[1]
    with dvf.capture_heads(pruned, layers=[layer.index]) as heads:
        pruned(images)
    assert heads[0].shape[1] == 2


@pytest.mark.parametrize("name", ZOO)
def test_leaves_nothing_behind(name):
    """Copies and pickles made inside, parameters, classes and outputs after."""
    entry, model, images, _ = made(name)
    if "wrt='input'" in entry.refused:
        pytest.skip("refused")
    classes = [type(m) for m in model.modules()]
    plain = entry.logits(model(images))
    context = dvf.HeadDiversity(model, layers=entry.layers)
    with context:
        entry.logits(model(images))
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert [type(m) for m in model.modules()] == classes
    for other in (model, copied, loaded):
        assert [type(m) for m in other.modules()] == classes
        torch.testing.assert_close(entry.logits(other(images)), plain)
    assert list(copied.state_dict()) == list(model.state_dict())
