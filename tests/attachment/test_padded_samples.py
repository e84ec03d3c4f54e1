"""PyTorch's own attention of samples that are padding throughout: zeros, not NaN, to second order."""

import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from tests.helpers.vits import gradients

WIDTH, HEADS, TOKENS = 8, 2, 4


class Reader(nn.Module):
    """Multi-head attention and a head; its weights go into the loss too."""

    def __init__(self, average=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.head = nn.Linear(WIDTH, 3)
        self.average = average

    def forward(self, x, **masks):
        options = {"need_weights": True, "average_attn_weights": self.average}
        y, self.weights = self.attn(x, x, x, **options, **masks)
        return self.head(y[:, 0])


def by_hand(model, x, allowed):
    """Logits and weights computed per row over the keys it may attend to; ``allowed`` [B, H, N, N]."""
    attn = model.attn
    q, k, v = (
        (x @ weight.T + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for weight, bias in zip(
            attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True
        )
    )
    rows, outputs = [], []
    for where in torch.cartesian_prod(*map(torch.arange, (len(x), HEADS, TOKENS))).tolist():
        sample, head, query = where
        keys = allowed[sample, head, query].nonzero().flatten()
        row = x.new_zeros(TOKENS)
        if len(keys):
            scores = k[sample, head, keys] @ q[sample, head, query] / (WIDTH // HEADS) ** 0.5
            row = row.index_put((keys,), scores.softmax(-1))
        rows.append(row)
        outputs.append(row @ v[sample, head])
    weights = torch.stack(rows).view(len(x), HEADS, TOKENS, TOKENS)
    heads = torch.stack(outputs).view(len(x), HEADS, TOKENS, -1)
    logits = model.head(attn.out_proj(heads.transpose(1, 2).flatten(2))[:, 0])
    return logits, weights.mean(1) if model.average else weights


def additive(forbidden):
    return torch.zeros(forbidden.shape).double().masked_fill(forbidden, -torch.inf)


PADDING = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]]).bool()
FUTURE = torch.ones(TOKENS, TOKENS).triu(1).bool()
LAST = torch.zeros(4 * HEADS, TOKENS, TOKENS).bool()
LAST[5, 2] = True  # all of the third query of one head of one sample
MASKS = {
    "padding": (PADDING, None),
    "all padding": (torch.ones_like(PADDING), None),
    "causal, padded in front": (PADDING, FUTURE),
    "a row of one head": (None, LAST),
    "padding, a row of one head": (PADDING, LAST),
    "rows of every sample": (None, torch.eye(TOKENS)[:, :1].bool().expand(TOKENS, TOKENS)),
}


@pytest.mark.parametrize("average", [True, False], ids=["mean", "each head"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("name", MASKS)
def test_weights_in_the_loss(name, kind, average):
    """Values, gradients and second derivatives of everything that both depend on."""
    padding, mask = MASKS[name]
    model = Reader(average).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, TOKENS, WIDTH, generator=g, dtype=torch.float64, requires_grad=True)
    allowed = torch.ones(4, HEADS, TOKENS, TOKENS).bool()
    if padding is not None:
        allowed &= ~padding[:, None, None]
    if mask is not None:
        allowed &= ~(mask if mask.ndim == 2 else mask.view(4, HEADS, TOKENS, TOKENS))
    masks = {"key_padding_mask": padding, "attn_mask": mask}
    masks = {key: m if kind == "bool" else additive(m) for key, m in masks.items() if m is not None}
    inputs = [x, model.attn.in_proj_weight, model.attn.in_proj_bias]

    def derivatives(logits, weights):
        loss = logits.sin().sum() + weights.square().sum() + weights[..., 0].sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(t.sin().sum() for t in first), inputs, retain_graph=True)
        return [logits, weights, *first, *second]

    context = dvf.HeadDiversity(model)
    with context:
        logits = model(x, **masks)
    ours = derivatives(logits, model.weights)
    theirs = derivatives(*by_hand(model, x, allowed))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    if name != "all padding":
        assert all(b.abs().max() > 1e-6 for b in theirs)
    penalty = context.penalty(logits)
    assert torch.isfinite(penalty)
    assert all(torch.isfinite(grad).all() for grad in gradients(model, penalty + logits.sum()))


@pytest.mark.parametrize("context", [dvf.HeadDiversity, dvf.capture_heads])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_an_encoder_of_padded_samples(kind, context):
    """In ``nn.TransformerEncoder`` all is finite, and other samples give what they give alone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, TOKENS, WIDTH, generator=g, dtype=torch.float64, requires_grad=True)
    padding = PADDING if kind == "bool" else additive(PADDING)
    with context(model, layers="all"):
        ours = model(x, src_key_padding_mask=padding)
        alone = model(x[2:3, :2])
    torch.testing.assert_close(ours[2:3, :2], alone, rtol=1e-9, atol=1e-11)
    (grad,) = torch.autograd.grad(ours.sin().sum(), x, create_graph=context is dvf.HeadDiversity)
    assert torch.isfinite(grad).all()
    if grad.requires_grad:
        assert all(torch.isfinite(t).all() for t in torch.autograd.grad(grad.sin().sum(), x))


@pytest.mark.parametrize("average", [True, False], ids=["mean", "each head"])
@pytest.mark.parametrize("context", [dvf.HeadDiversity, dvf.capture_heads, None])
def test_weights_after_dropout_are_those_that_were_used(context, average):
    """As PyTorch's: the same output and weights from the same state of the generator."""
    model = Reader(average, dropout=0.5).double().train()
    if context is None:  # not a chosen layer: beside one
        model.other = Reader(dropout=0.0).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, TOKENS, WIDTH, generator=g, dtype=torch.float64)
    torch.manual_seed(2)
    expect = [model(x), model.weights]
    theirs = gradients(model, expect[0].sin().sum() + expect[1].square().sum())
    around = dvf.HeadDiversity(model) if context is None else context(model)
    with around:
        if context is None:
            model.other(x)
        torch.manual_seed(2)
        ours = [model(x), model.weights]
    for a, b in zip(ours, expect, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(
        gradients(model, ours[0].sin().sum() + ours[1].square().sum()), theirs, strict=True
    ):
        torch.testing.assert_close(a, b)
    assert (expect[1] == 0).any() or average
