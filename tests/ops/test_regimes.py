"""Attention in the regimes people train in: saturated softmax, rows masked by finite numbers, trained weights."""

import contextlib
import importlib
import itertools

import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.ops import reference
from diversevit_kernels.common.contracts import AttentionBackward, AttentionDoubleBackward
from tests.helpers.regimes import (
    MASKED,
    Problem,
    assert_as_exact_as_eager,
    error,
    errors_over_eager,
    saturated,
    to_second_order,
    with_uniform_rows,
)

TOPS = (5, 30, 60, 100)


@pytest.fixture(params=["native", "tiles"])
def path(request, monkeypatch):
    """The C++ kernels, and what runs where none can be compiled."""
    if request.param == "tiles":
        monkeypatch.setenv("DIVERSEVIT_COMPILE", "0")


def problems(dtype, top, mask, d=64):
    sizes = itertools.product((1, 16, None), (129, 197), range(3))
    return (saturated(Nq or Nk, Nk, d, top, mask, seed, dtype) for Nq, Nk, seed in sizes)


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "trained mask"])
@pytest.mark.parametrize("top", TOPS)
def test_saturated_float32(top, mask, path):
    ratios = errors_over_eager(dvf.attention, problems(torch.float32, top, mask))
    assert_as_exact_as_eager(ratios, 1.3, 2)


@pytest.mark.parametrize("d", [20, 48])
def test_saturated_with_a_scale_that_rounds(d):
    """Of these widths the scale is no power of two: where one key takes all, P is 1 to the last bit all the same."""
    ratios = errors_over_eager(dvf.attention, problems(torch.float32, 100, False, d))
    assert_as_exact_as_eager(ratios, 1.3, 2)


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "trained mask"])
@pytest.mark.parametrize("top", [5, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_saturated_half(dtype, top, mask):
    """Scores are in float32: better than eager's, which are rounded."""
    some = itertools.islice(problems(dtype, top, mask), 0, None, 3)
    assert_as_exact_as_eager(errors_over_eager(dvf.attention, some), 0.8, 1)


@pytest.mark.parametrize("tokens", [255, 256])
def test_a_trained_mask_in_bfloat16_is_as_exact_as_pytorchs(tokens):
    """At the number of scores where formulas are compiled, and below it."""
    p = saturated(tokens, tokens, 64, 30, True, 0, torch.bfloat16)
    p = Problem([x[:, :1] for x in p.inputs], p.do[:, :1], [x[:, :1] for x in p.dd])

    def first(attend, p):
        leaves = [x.detach().requires_grad_() for x in p.inputs]
        return torch.autograd.grad(attend(*leaves), leaves, p.do)

    exact = first(dvf.ops.reference.attention, p.to(torch.float64))
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        stock = first(nn.functional.scaled_dot_product_attention, p)
    for ours, theirs, truth in zip(first(dvf.attention, p), stock, exact, strict=True):
        assert error(ours, truth) <= 1.3 * error(theirs, truth)


@pytest.mark.parametrize("dropped", ["own sum", "normalised means"])
def test_a_probability_that_is_not_normalised_is_seen(dropped, monkeypatch):
    """P = exp(S - lse) with a rounded lse passes at small scores and fails where softmax saturates."""
    right = reference.softmax_statistics

    def unnormalised(s):
        p, _ = right(s)
        lse = s.logsumexp(-1, keepdim=True)
        rounded = (s - lse).exp()
        return (rounded if dropped == "own sum" else p * (1 + 2e-6)), right(s)[1]

    module = importlib.import_module("diversevit_fast.ops.reference.attention")
    monkeypatch.setattr(module, "softmax_statistics", unnormalised)
    ratios = errors_over_eager(_by_formula, problems(torch.float32, 100, False))
    with pytest.raises(AssertionError):
        assert_as_exact_as_eager(ratios, 1.3, 2)
    monkeypatch.undo()
    assert_as_exact_as_eager(
        errors_over_eager(_by_formula, problems(torch.float32, 100, False)), 1.3, 2
    )


class _Formula(torch.autograd.Function):
    """The reference's three functions as they stand, whatever softmax they call."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return reference.attention_forward(q, k, v, None, None, False, q.shape[-1] ** -0.5, 0.0)[0]

    @staticmethod
    def backward(ctx, do):
        return _Slope.apply(*ctx.saved_tensors, do)


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, do):
        ctx.save_for_backward(q, k, v, do)
        scale = q.shape[-1] ** -0.5
        return reference.attention_backward(
            AttentionBackward(q, k, v, None, None, do, do, do, False, scale, 0.0, False)
        )[:3]

    @staticmethod
    def backward(ctx, *dd):
        q, k, v, do = ctx.saved_tensors
        tensors = (q, k, v, None, None, do, do, do, None, *dd, None)
        given = AttentionDoubleBackward(*tensors, False, q.shape[-1] ** -0.5, 0.0, False)
        return reference.attention_double_backward(given)[:4]


def _by_formula(q, k, v):
    return _Formula.apply(q, k, v)


def test_the_smallest_saturated_row():
    q = torch.tensor([30.0]).view(1, 1, 1, 1).requires_grad_()
    k, v = torch.tensor([1.0, 0.5]).view(1, 1, 2, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    (dq,) = torch.autograd.grad(dvf.attention(q, k, v, scale=1.0).sum(), q)
    assert dq.item() == pytest.approx(1.53e-7, abs=6e-8)  # eager's error: 5.2e-8


VALUES = {
    "-1e9": -1e9,
    "least": None,  # of the mask's dtype
}


def masked(rows, value, Nq, Nk, dtype):
    where = MASKED[rows](Nq, Nk)
    value = torch.finfo(dtype).min if value is None else value
    return where, torch.zeros(where.shape, dtype=dtype).masked_fill(where, value)


@pytest.mark.parametrize("trained", [False, True], ids=["mask", "trained mask"])
@pytest.mark.parametrize("Nq", [1, 16, 67])
@pytest.mark.parametrize("rows", MASKED)
@pytest.mark.parametrize("value", ["-1e9", "least"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_masked_by_finite_numbers_are_uniform(dtype, value, rows, Nq, trained, path):
    check_masked_rows(dvf.attention, dtype, VALUES[value], rows, Nq, 67, trained)


def check_masked_rows(attend, dtype, value, rows, Nq, Nk, trained):
    p = saturated(Nq, Nk, 16, 5, False, 0, dtype)
    where, mask = masked(rows, value, Nq, Nk, dtype)
    if trained:
        ddmask = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        p = Problem([*p.inputs, mask], p.do, [*p.dd, ddmask])
        ours = to_second_order(attend, p)
    else:
        ours = to_second_order(lambda q, k, v: attend(q, k, v, mask), p)
    exact = to_second_order(with_uniform_rows(where), p.to(torch.float64))
    for name, truth in exact.items():
        size = float(truth.abs().max())
        bound = 40 * torch.finfo(dtype).eps * size
        assert float((ours[name].double() - truth).abs().max()) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_shifted_by_ten_thousand_are_as_pytorchs(dtype, path):
    """-1e4 leaves something of a float32 score: what PyTorch's own formula in float32 makes of it."""
    p = saturated(19, 67, 16, 5, False, 0, dtype)
    _, mask = masked("one row", -1e4, 19, 67, dtype)
    ours = to_second_order(lambda q, k, v: dvf.attention(q, k, v, mask), p)

    def plain(q, k, v):
        return reference.attention(q, k, v, mask.to(q.dtype))

    for name, expect in to_second_order(plain, p.to(torch.float32)).items():
        bound = 0.02 if dtype != torch.float32 else 2e-3  # an ulp of 1e4 is 1e-3
        assert float((ours[name] - expect).abs().max()) <= bound * float(expect.abs().max()), name


def test_finite_masks_stay_finite_under_autocast():
    q = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    for dtype, value in ((torch.bfloat16, torch.finfo(torch.float32).min), (torch.float16, -1e9)):
        mask = torch.zeros(1, 1, 9, 9).masked_fill(torch.arange(9).view(9, 1).eq(4), value)
        with torch.autocast("cpu", dtype):
            o = dvf.attention(q, q, q, mask)
        torch.testing.assert_close(
            o[:, :, 4].float(), q.to(dtype).float().mean(2), atol=0.01, rtol=0.01
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_mask_of_another_dtype(dtype, backend):
    """As PyTorch takes float32 masks beside any queries; the gradient is in the mask's dtype."""
    p = saturated(9, 13, 8, 5, True, 0, torch.float64)
    p = Problem([*(x.to(dtype) for x in p.inputs[:3]), p.inputs[3].float()], p.do.to(dtype), p.dd)
    p = p._replace(dd=[y.to(x.dtype) for x, y in zip(p.inputs, p.dd, strict=True)])
    with dvf.use_backend(backend):
        ours = to_second_order(dvf.attention, p)
    assert ours["dm"].dtype == ours["gm"].dtype == torch.float32
    for name, truth in to_second_order(reference.attention, p.to(torch.float64)).items():
        assert float((ours[name].double() - truth).abs().max()) <= 0.1 * float(truth.abs().max())


def test_padding_of_a_transformer_encoder():
    """A sample that is padding from end to end, by a large finite number, is uniform as it is in PyTorch."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(3, 7)
    padding[0], padding[1, 4:] = -1e9, -1e9

    def penalty(watch):
        x_ = x.clone().requires_grad_()
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), watch:
            out = encoder(x_, src_key_padding_mask=padding)
            (g,) = torch.autograd.grad(out.sin().sum(), x_, create_graph=True)
        return torch.autograd.grad(g.square().sum(), list(encoder.parameters()))

    ours = penalty(dvf.HeadDiversity(encoder, layers="all"))
    stock = penalty(contextlib.nullcontext())
    size = max(float(x.abs().max()) for x in stock)
    for one, two in zip(ours, stock, strict=True):
        assert float((one - two).abs().max()) <= 1e-5 * size


@pytest.mark.parametrize("pair", [False, True], ids=["function", "operator pair"])
def test_biases_of_xformers(pair):
    """A tensor, and the causal mask with a tensor, whose large finite numbers mask a row from end to end."""
    pytest.importorskip("xformers")
    from xformers import ops as xops
    from xformers.ops.fmha import attn_bias as biases

    from diversevit_fast.integrations.xformers import BwOp, FwOp, memory_efficient_attention

    def attend(bias):
        def call(q, k, v):
            heads_last = [x.transpose(1, 2) for x in (q, k, v)]
            if pair:
                out = xops.memory_efficient_attention(*heads_last, bias, op=(FwOp, BwOp))
            else:
                out = memory_efficient_attention(*heads_last, bias)
            return out.transpose(1, 2)

        return call

    p = saturated(16, 16, 8, 5, False, 0, torch.float32)
    where = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    where[:, :, 5] = True
    bias = torch.zeros(where.shape).masked_fill(where, -1e9)
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    for given, seen in (
        (bias, torch.ones(16, 16, dtype=torch.bool)),
        (biases.LowerTriangularMaskWithTensorBias(bias), causal),
    ):

        def exact(q, k, v, seen=seen):
            scores = q @ k.mT * q.shape[-1] ** -0.5
            scores = torch.where(where, scores - scores.detach(), scores)
            return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

        leaves = [
            [x.to(t).requires_grad_() for x in p.inputs] for t in (torch.float32, torch.float64)
        ]
        outs = attend(given)(*leaves[0]), exact(*leaves[1])
        grads = [torch.autograd.grad(o, x, p.do.to(o)) for o, x in zip(outs, leaves, strict=True)]
        results = [(o.detach(), *some) for o, some in zip(outs, grads, strict=True)]
        for one, two in zip(*results, strict=True):
            assert float((one - two).abs().max()) <= 1e-5 * float(two.abs().max())


def test_additive_masks_of_transformers():
    """A sample that is padding from end to end, as transformers' masks say it: with the least number of the dtype."""
    pytest.importorskip("transformers")
    from diversevit_fast.integrations.huggingface import attention_forward

    p = saturated(5, 5, 8, 5, False, 0, torch.float32)
    where, mask = masked("one row", None, 5, 5, torch.float32)

    def attend(q, k, v):
        call = attention_forward(nn.Module(), q, k, v, mask, scaling=8**-0.5, dropout=0.0)
        return call[0].transpose(1, 2)

    truth = to_second_order(with_uniform_rows(where), p.to(torch.float64))
    for name, ours in to_second_order(attend, p).items():
        assert float((ours - truth[name]).abs().max()) <= 1e-5 * float(truth[name].abs().max())


@pytest.mark.parametrize("scale", [0.3, 0.7])
def test_where_one_key_takes_all_nothing_is_left(scale, path):
    """As in PyTorch: P is 1 to the last bit and dP - delta is 0, whatever the scale rounds."""
    p = saturated(16, 24, 8, 20, False, 0, torch.float32)
    q, k, v = p.inputs
    k[:, :, 5] = 0
    k[:, :, 5, 0], q[..., 0] = 30.7, 13.1 / scale
    q, k = (x.requires_grad_() for x in (q, k))
    out = dvf.attention(q, k, v, scale=scale)
    assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(out, (q, k), p.do))


@pytest.mark.parametrize("trained", [False, True], ids=["mask", "trained mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_least_float64_is_finite_in_scores_of_float32(dtype, trained, path):
    p = saturated(9, 13, 8, 5, False, 0, dtype)
    where, mask = masked("one row", None, 9, 13, torch.float64)
    if trained:
        p = Problem([*p.inputs, mask], p.do, [*p.dd, torch.ones_like(mask)])
    ours = to_second_order(lambda q, k, v, m=mask: dvf.attention(q, k, v, m), p)
    for name, truth in to_second_order(with_uniform_rows(where), p.to(torch.float64)).items():
        bound = 40 * torch.finfo(dtype).eps * float(truth.abs().max())
        assert float((ours[name].double() - truth).abs().max()) <= bound, name


class Reads(nn.Module):
    """PyTorch's multi-head attention and a classifier."""

    def __init__(self, need_weights, dropout):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.head, self.need_weights = nn.Linear(8, 3), need_weights

    def forward(self, x, **masks):
        y, self.weights = self.attn(x, x, x, need_weights=self.need_weights, **masks)
        return self.head(y.mean(1))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("argument", ["key_padding_mask", "attn_mask"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
def test_float32_masks_of_multi_head_attention_in_half_precision(kind, argument, need_weights):
    """Large finite numbers that the model's dtype has only as infinity leave rows uniform all the same."""
    half = torch.bfloat16 if kind != "float16" else torch.float16
    torch.manual_seed(0)
    exact = Reads(need_weights, 0.0).double()
    model = Reads(need_weights, 0.0)
    model.load_state_dict(exact.state_dict())
    model = model if kind == "autocast" else model.to(half)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    mask = torch.zeros(3, 5) if argument == "key_padding_mask" else torch.zeros(5, 5)
    mask[1] = torch.finfo(torch.float32).min

    def results(model, x, mask):
        x, diversity = x.clone().requires_grad_(), dvf.HeadDiversity(model)
        with diversity:
            logits = model(x, **{argument: mask})
        penalty = diversity.penalty(logits)
        (dx,) = torch.autograd.grad(logits.float().sin().sum() + penalty, x)
        return logits, dx, penalty, *((model.weights,) if need_weights else ())

    with torch.autocast("cpu", half, enabled=kind == "autocast"):
        ours = results(model, x.to(model.head.weight.dtype), mask)
    for one, two in zip(ours, results(exact, x, mask.double()), strict=True):
        assert float((one.double() - two).abs().max().detach()) <= 0.03 * float(
            two.detach().abs().max()
        )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_mask_of_weights_that_are_dropped(half):
    torch.manual_seed(0)
    model = Reads(True, 0.5).to(half).train()
    with dvf.HeadDiversity(model, wrt="output"):
        logits = model(torch.randn(3, 5, 8).to(half), key_padding_mask=torch.full((3, 5), -1e9))
    assert logits.dtype == model.weights.dtype == half
    assert set(model.weights.detach().mul(10).round().flatten().tolist()) <= {0.0, 2.0, 4.0}
