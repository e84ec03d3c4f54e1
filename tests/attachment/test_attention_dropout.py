"""Attention dropout inside every context: in float64 what the formula gives under the same bits."""

from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.attachment.attention_modules import attention_layers
from tests.attachment.test_attention_maps import Grouped
from tests.attachment.test_hooks import unfused
from tests.helpers.eager import Eager, eager_penalty
from tests.helpers.versions import compiles_losses
from tests.helpers.vits import assert_same, gradients, timm_vit
from tests.helpers.zoo import Encoder, _hugging_face, _logits, _timm

P = 0.4


def _swin():
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 12}
    options = {"num_classes": 5, "attn_drop_rate": P, "drop_path_rate": 0.0}
    return SwinTransformer(**sizes, **options, depths=(2, 2), num_heads=(2, 3))


def _encoder():
    model = Encoder()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = P
    return model


def _grouped():
    """Causal attention of heads that share keys, which is all there is of the model."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attn, self.head = nn.Conv2d(3, 16, 8, 8), Grouped(), nn.Linear(16, 5)

        def forward(self, images):
            x = self.embed(images).flatten(2).mT
            dropout = P if self.training else 0.0
            return self.head(x + self.attn(x, is_causal=True, dropout_p=dropout)).mean(1)

    return Model()


MODELS = {
    "timm": (_timm("vit_tiny_patch16_224", attn_drop_rate=P), lambda out: out),
    "timm, unfused": (
        lambda: unfused(MODELS["timm, mean of all tokens"][0]()),
        lambda out: out,
    ),
    "timm, mean of all tokens": (
        _timm("vit_tiny_patch16_224", attn_drop_rate=P, global_pool="avg"),
        lambda out: out,
    ),
    "Swin": (_swin, lambda out: out),
    "transformers": (_hugging_face("ViT", attention_probs_dropout_prob=P), _logits),
    "torch encoder": (_encoder, lambda out: out),
    "grouped": (_grouped, lambda out: out),
}


def made(name, training=True):
    if name == "transformers":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    make, logits_of = MODELS[name]
    model = make().double().train(training)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():  # initial weights are often zero or tiny
            p += 0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    images = torch.randn(2, 3, 16, 16, generator=g, dtype=torch.float64)
    return model, images, lambda x: logits_of(model(x))


def penalised(model, images, logits_of, context, seed=5):
    """Logits, and the gradients of a loss with a gradient penalty."""
    images = images.clone().requires_grad_()
    torch.manual_seed(seed)
    with context:
        logits = logits_of(images)
    (grad,) = torch.autograd.grad(logits.sin().sum(), images, create_graph=True)
    return logits, gradients(model, logits.cos().sum() + grad.square().sum())


class Fused(Eager):
    """Attention by the formula, also of modules that compute it step by step outside every context."""

    def __init__(self, model):
        super().__init__()
        self.apart = [m for m in model.modules() if getattr(m, "fused_attn", None) is False]

    def __enter__(self):
        for module in self.apart:
            module.fused_attn = True
        return super().__enter__()

    def __exit__(self, *exception):
        for module in self.apart:
            module.fused_attn = False
        return super().__exit__(*exception)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_penalty(name, training):
    model, images, logits_of = made(name, training)
    expect, theirs = penalised(model, images, logits_of, Fused(model))
    contexts: list = []
    if name not in ("timm", "grouped"):  # the class-token shortcut has its own bits; refused
        contexts.append(dvf.HeadDiversity(model, layers="all"))
    if name not in ("timm, unfused", "Swin"):  # softmax and dropout of their own
        contexts.append(dvf.second_order())
    for context in contexts:
        logits, ours = penalised(model, images, logits_of, context)
        torch.testing.assert_close(logits, expect, rtol=1e-9, atol=1e-11)
        assert_same(ours, theirs)
    other = penalised(model, images, logits_of, Fused(model), seed=6)[0]
    assert ((other - expect).abs().max() > 1e-3) == training


@pytest.mark.parametrize("wrt", ["input", "output"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "timm"])
def test_the_head_penalty(name, wrt):
    """It is that of the forward in which weights were dropped."""
    model, images, logits_of = made(name)
    layer = attention_layers(model)[0]
    if name == "grouped" and wrt == "input":
        pytest.skip("refused: heads share keys")
    diversity = dvf.HeadDiversity(model, layers=[0], wrt=wrt)
    torch.manual_seed(5)
    # heads of the lowest layer are those of PyTorch's attention where its inputs are not differentiated by
    with dvf.second_order() if wrt == "output" else nullcontext(), diversity:
        logits = logits_of(images)
    penalty = diversity.penalty(logits)
    torch.manual_seed(5)
    expect_logits, expect = eager_penalty(model, images, layer.module, wrt, MODELS[name][1])
    torch.testing.assert_close(logits, expect_logits, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(penalty, expect, rtol=1e-8, atol=1e-12)
    assert_same(
        gradients(model, penalty + logits.sum()), gradients(model, expect + expect_logits.sum())
    )


class ClassTokenAlone(Eager):
    """Of the watched module only the first query attends, as in the class-token shortcut."""

    def _attend(self, query, *rest, **options):
        if not self.inside:
            return super()._attend(query, *rest, **options)
        return super()._attend(query[..., :1, :], *rest, **options).expand_as(query)


@pytest.mark.parametrize("twice", [False, True])
def test_the_class_token_shortcut(twice):
    model = timm_vit(attn_drop_rate=P, depth=1).train()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    module = attention_layers(model)[0].module
    diversity = dvf.HeadDiversity(model, wrt="input")
    torch.manual_seed(5)
    with diversity, dvf.second_order() if twice else nullcontext():
        logits = model(images)
    penalty = diversity.penalty(logits)
    torch.manual_seed(5)
    expect_logits, expect = eager_penalty(model, images, module, "input", eager=ClassTokenAlone)
    torch.testing.assert_close(logits, expect_logits, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(penalty, expect, rtol=1e-8, atol=1e-12)
    assert_same(gradients(model, penalty), gradients(model, expect))


@pytest.mark.parametrize("name", MODELS)
def test_keep_and_capture_heads(name):
    model, images, logits_of = made(name)
    layer = attention_layers(model)[0]
    scale = torch.zeros(layer.num_heads, dtype=torch.float64)
    scale[1] = layer.num_heads
    torch.manual_seed(5)
    with Eager(layer.module, scale) as seen:
        expect = logits_of(images)
    for swapped in (False, True):
        capture = dvf.capture_heads(model, layers=[0])
        both = [dvf.keep_heads(model, {0: [1]}), capture]
        torch.manual_seed(5)
        with ExitStack() as stack:
            for context in (dvf.second_order(), *(both[::-1] if swapped else both)):
                stack.enter_context(context)
            logits = logits_of(images)
        torch.testing.assert_close(logits, expect, rtol=1e-9, atol=1e-11)
        heads = capture[0] * (scale[:, None, None] if swapped else 1)
        torch.testing.assert_close(heads * (scale > 0)[:, None, None], seen.heads[0])


CONTEXTS = {
    "second_order": lambda model: dvf.second_order(),
    "penalty": lambda model: dvf.HeadDiversity(model, layers="all"),
    "penalty of outputs": lambda model: dvf.HeadDiversity(model, layers="all", wrt="output"),
    "keep_heads": lambda model: dvf.keep_heads(model, {0: [1]}),
    "capture_heads": dvf.capture_heads,
    "maps": lambda model: dvf.capture_heads(model, maps="class"),
    "every map": lambda model: dvf.capture_heads(model, maps="all"),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["timm, mean of all tokens", "transformers", "torch encoder"])
def test_checkpoints_restore_the_bits(name, context):
    model, images, logits_of = made(name)

    def run(forward):
        torch.manual_seed(5)
        around = CONTEXTS[context](model)
        with dvf.second_order() if context != "second_order" else nullcontext(), around:
            logits = forward(images)
        loss = logits.sin().sum()
        if isinstance(around, dvf.HeadDiversity):
            loss = loss + 100 * around.penalty(logits)
        torch.manual_seed(7)  # what is drawn in between does not matter
        return logits, gradients(model, loss)

    expect, theirs = run(logits_of)
    logits, ours = run(lambda x: checkpoint(logits_of, x, use_reentrant=False))
    torch.testing.assert_close(logits, expect)
    assert_same(ours, theirs)


@pytest.mark.parametrize("around", [nullcontext, dvf.second_order])
@pytest.mark.parametrize("maps", ["class", [2, 0], "all"], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_maps_are_after_dropout(name, maps, around):
    """Kept probabilities are 1 / (1 - p) times larger; the head outputs are made of them."""
    if name == "Swin" and maps == "class":
        pytest.skip("refused")
    model, images, logits_of = made(name)
    with dvf.capture_heads(model.eval(), layers=[0], maps=maps) as heads:
        logits_of(images)
    plain = heads.maps[0]
    model.train()
    with around(), dvf.capture_heads(model, layers=[0], maps=maps) as heads:
        logits = logits_of(images)
    dropped = heads.maps[0]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / (1 - P))
    assert 0.4 < kept.sum() / (plain != 0).sum() < 0.8
    (grad,) = torch.autograd.grad(logits.sin().sum(), dropped)
    assert maps != "all" or grad.abs().max() > 1e-6


def test_fractions_and_steps_in_between():
    """Every sample is dropped on its own: the penalty of drawn samples is finite and trains; none in between."""
    model, images, _ = made("timm, mean of all tokens")
    diversity = dvf.HeadDiversity(model, layers="all", fraction=0.5, every=2)
    for step in range(4):
        with diversity:
            logits = model(images)
        penalty = diversity.penalty(logits)
        assert (penalty > 0) == (step % 2 == 0)
        if step % 2 == 0:
            assert diversity.samples is not None
            assert len(diversity.samples) == 1
            assert max(g.abs().max() for g in gradients(model, penalty)) > 1e-8


@compiles_losses
def test_a_compiled_loss():
    model, images, _ = made("timm, mean of all tokens")
    diversity = dvf.HeadDiversity(model, layers="all")

    def loss(model, images):
        with diversity:
            logits = model(images)
        return logits.square().sum() + 100 * diversity.penalty(logits)

    compiled = dvf.compile_loss(loss, backend="aot_eager")
    torch.manual_seed(5)
    first = compiled(model, images)
    assert not torch.equal(first, compiled(model, images))  # other weights are dropped
    torch.manual_seed(5)
    again = compiled(model, images)
    torch.testing.assert_close(first, again)
    torch.manual_seed(5)
    torch.testing.assert_close(loss(model, images), first)
    assert max(g.abs().max() for g in gradients(model, again)) > 1e-6
