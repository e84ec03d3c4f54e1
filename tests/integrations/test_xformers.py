"""xformers' signature, biases and operator pair, against its own plain formula in float64.

xformers warns when it finds no GPU; that is not what is tested. Its own test-suite runs by
``python -m tools.docs.xformers_suite``.
"""

import warnings

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError

pytest.importorskip("xformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import xformers.ops as xops
    from xformers.attn_bias_utils import create_attn_bias
    from xformers.ops.fmha import attn_bias as biases

    from diversevit_fast.integrations.xformers import BwOp, FwOp, memory_efficient_attention
    from diversevit_fast.integrations.xformers_blocks import TYPES

B, M, H, K, KV = 2, 6, 4, 8, 5
PAGED = "Paged"
KNOWN = sorted((t for t in TYPES if issubclass(t, biases.AttentionBias)), key=lambda t: t.__name__)
EVERY = [type(None), torch.Tensor, *KNOWN]


def tensors(bias_type, axes=4, dtype=torch.float64, value_width=KV):
    """q, k, v, bias as xformers' own tests make them; packed along one row where the bias is."""
    g = torch.Generator().manual_seed(0)
    paged = issubclass(bias_type, biases.AttentionBias) and bias_type.__name__.startswith(PAGED)
    tokens = M + 2 * ("Bottom" in bias_type.__name__ or "Offset" in bias_type.__name__ or paged)
    heads = {3: (), 4: (H,), 5: (2, H // 2)}[axes]
    groups = (2, H // 2) if axes == 5 else (1, H if axes == 4 else 1)
    page = 4 if paged else None
    bias = create_attn_bias(
        bias_type,
        batch_size=B,
        num_heads=groups[1],
        num_heads_groups=groups[0],
        q_len=M,
        kv_len=tokens,
        device="cpu",
        dtype=dtype,
        requires_grad=False,
        fmt={3: "BMK", 4: "BMHK", 5: "BMGHK"}[axes],
        page_size=page,
    )
    q = torch.randn(B, M, *heads, K, generator=g, dtype=dtype)
    k = torch.randn(B, tokens, *heads, K, generator=g, dtype=dtype)
    v = torch.randn(B, tokens, *heads, value_width, generator=g, dtype=dtype)
    if isinstance(bias, biases.VARLEN_BIASES):
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    return q, k, v, bias


def plain(q, k, v, bias, scale=None):
    """The formula of xformers' documentation, rows that attend to nothing set to zero."""
    shape = (*q.shape[:-1], v.shape[-1])
    q, k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    where = (1, 1, *scores.shape[2:])
    if type(bias) is biases.LowerTriangularMaskWithTensorBias:
        causal = biases.LowerTriangularMask().materialize(where, dtype=q.dtype)
        scores = scores + bias._bias.reshape(scores.shape) + causal
    elif isinstance(bias, biases.AttentionBias):
        scores = scores + bias.materialize(where, dtype=q.dtype)
    elif bias is not None:
        scores = scores + bias.reshape(scores.shape)
    nothing = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return (weights @ v).transpose(1, 2).reshape(shape)


def leaves_of(q, k, v, bias):
    inner = getattr(bias, "_bias", bias)
    found = [q, k, v, *([inner] if isinstance(inner, torch.Tensor) else [])]
    return [x.requires_grad_() for x in found]


def second_order(out, leaves):
    """The output, its gradient and the gradient of that gradient's square."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(out.shape, generator=g, dtype=out.dtype)
    first = torch.autograd.grad((out * weight).sum(), leaves, create_graph=True)
    return out, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), leaves)


@pytest.mark.parametrize("axes", [3, 4, 5])
@pytest.mark.parametrize("bias_type", EVERY, ids=lambda t: t.__name__)
def test_to_second_order(bias_type, axes):
    if axes == 3 and bias_type not in (type(None), torch.Tensor, biases.LowerTriangularMask):
        pytest.skip("xformers refuses this bias without an axis of heads")
    q, k, v, bias = tensors(bias_type, axes)
    leaves = leaves_of(q, k, v, bias)
    ours = second_order(memory_efficient_attention(q, k, v, bias), leaves)
    torch.testing.assert_close(
        ours, second_order(plain(q, k, v, bias), leaves), rtol=1e-9, atol=1e-11
    )


def test_every_bias_of_xformers_is_known():
    """A bias that a later xformers adds is made a tensor until it is listed."""
    every = [x for x in vars(biases).values() if isinstance(x, type)]
    known = {x for x in every if issubclass(x, biases.AttentionBias)} - {biases.AttentionBias}
    assert known == set(KNOWN)


def test_a_parameter_as_bias():
    q, k, v, _ = tensors(type(None))
    bias = torch.nn.Parameter(torch.ones(B, H, M, M, dtype=q.dtype))
    (grad,) = torch.autograd.grad(memory_efficient_attention(q, k, v, bias).square().sum(), bias)
    (expect,) = torch.autograd.grad(plain(q, k, v, bias).square().sum(), bias)
    torch.testing.assert_close(grad, expect, rtol=1e-9, atol=1e-11)


def test_a_bias_of_ones_own():
    """Made a tensor by its own materialize."""

    class Distance(biases.AttentionBias):
        def materialize(self, shape, dtype=torch.float32, device="cpu"):
            place = torch.arange(max(shape[-2:]), device=device, dtype=dtype)
            gap = place[: shape[-2], None] - place[: shape[-1]]
            return (-0.3 * gap.abs()).expand(shape)

    q, k, v, _ = tensors(type(None))
    leaves = leaves_of(q, k, v, None)
    ours = second_order(memory_efficient_attention(q, k, v, Distance()), leaves)
    torch.testing.assert_close(
        ours, second_order(plain(q, k, v, Distance()), leaves), rtol=1e-9, atol=1e-11
    )


def shared_pages():
    """Two sequences whose first page is the same."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, H, K, generator=g)
    k, v = (torch.randn(1, 12, H, K, generator=g) for _ in "kv")
    bias = biases.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[2, 2],
        kv_seqlen=[7, 6],
        block_tables=torch.tensor([[0, 1], [0, 2]], dtype=torch.int32),
        page_size=4,
        device=torch.device("cpu"),
    )
    return q, k, v, bias


@pytest.mark.parametrize("pair", [False, True])
def test_pages_of_several_sequences_get_the_sum_of_their_gradients(pair):
    q, k, v, bias = shared_pages()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if pair:
        out = xops.memory_efficient_attention(q, k, v, bias, op=(FwOp, BwOp))
    else:
        out = memory_efficient_attention(q, k, v, bias)
    where = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 8, 9]]
    expect = torch.cat(
        [plain(q[:, 2 * i : 2 * i + 2], k[:, w], v[:, w], None) for i, w in enumerate(where)], 1
    )
    torch.testing.assert_close(out, expect)
    ours, theirs = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, expect))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_scale_and_output_dtype(scale):
    q, k, v, _ = tensors(type(None))
    out = memory_efficient_attention(q, k, v, scale=scale, output_dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, plain(q, k, v, None, scale).float())


def test_expanded_keys_get_their_whole_gradient():
    """xformers' way of sharing keys among heads, [B, M, G, 1, K] expanded."""
    q = torch.randn(2, 5, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 5, 2, 1, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    wide = [x.expand(-1, -1, -1, 3, -1) for x in (k, v)]
    ours = second_order(memory_efficient_attention(q, *wide), [q, k, v])
    torch.testing.assert_close(
        ours, second_order(plain(q, *wide, None), [q, k, v]), rtol=1e-9, atol=1e-11
    )


def test_keys_outside_every_sequence_are_not_read():
    q, k, v, _ = tensors(type(None))
    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    bias = biases.BlockDiagonalPaddedKeysMask.from_seqlens([M, M], kv_padding=M, kv_seqlen=[3, 2])
    expect = memory_efficient_attention(q, k, v, bias)
    k[:, [3, 4, 5, 8, 9, 10, 11]] = torch.nan
    v[:, [3, 4, 5, 8, 9, 10, 11]] = torch.nan
    assert torch.equal(memory_efficient_attention(q, k, v, bias), expect)


def test_compiled():
    q, k, v, _ = tensors(type(None))
    bias = torch.randn(B, H, M, M, dtype=q.dtype)
    leaves = leaves_of(q, k, v, bias)
    compiled = torch.compile(memory_efficient_attention, fullgraph=True, backend="aot_eager")
    first = torch.autograd.grad(compiled(q, k, v, bias).square().sum(), leaves)
    expect = torch.autograd.grad(plain(q, k, v, bias).square().sum(), leaves)
    torch.testing.assert_close(first, expect, rtol=1e-9, atol=1e-11)


class TestBadInput:
    @pytest.fixture
    def qkv(self):
        return tensors(type(None))[:3]

    def test_another_operator(self, qkv):
        with pytest.raises(UnsupportedError, match="op: there is one operator here"):
            memory_efficient_attention(*qkv, op=(FwOp, BwOp))

    def test_dropout(self, qkv):
        torch.manual_seed(0)
        found = memory_efficient_attention(*qkv, p=0.5)
        torch.manual_seed(0)
        wanted = dvf.attention(*(x.transpose(1, 2) for x in qkv), dropout_p=0.5)
        torch.testing.assert_close(found, wanted.transpose(1, 2))

    def test_shapes_as_xformers_says(self, qkv):
        q, k, v = qkv
        with pytest.raises(ValueError, match="Incompatible shapes"):
            memory_efficient_attention(q, k[:, :, :2], v)

    @pytest.mark.parametrize("axes", [3, 5])
    def test_a_bias_that_would_be_broadcast(self, axes):
        q, k, v, _ = tensors(type(None), axes)
        with pytest.raises(UsageError, match="attn_bias: expected shape"):
            memory_efficient_attention(q, k, v, torch.zeros(1, *([1] * (axes - 3)), M, M).double())

    def test_packed_otherwise_than_the_bias_says(self, qkv):
        q, k, v = (x.flatten(0, 1)[None] for x in qkv)
        with pytest.raises(UsageError, match="query: expected 11 tokens"):
            memory_efficient_attention(q, k, v, biases.BlockDiagonalMask.from_seqlens([M, M - 1]))
        bias = biases.BlockDiagonalMask.from_seqlens([M, M], [M, M + 1])
        with pytest.raises(UsageError, match="key: expected 13 tokens or more"):
            memory_efficient_attention(q, k, v, bias)

    @pytest.mark.parametrize("empty", ["batch", "query", "key"])
    def test_nothing(self, qkv, empty):
        q, k, v = qkv
        if empty == "batch":
            q, k, v = q[:0], k[:0], v[:0]
        elif empty == "query":
            q = q[:, :0]
        else:
            k, v = k[:, :0], v[:, :0]
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = memory_efficient_attention(q, k, v)
        assert out.shape == (*q.shape[:-1], KV)
        assert not out.any()
        first = torch.autograd.grad(out.sum(), [q, k, v], create_graph=True)
        assert not any(x.any() for x in first)
        assert not any(x.any() for x in torch.autograd.grad(first[0].sum() + out.sum(), [q, k, v]))


class TestPair:
    """``xops.memory_efficient_attention(..., op=(FwOp, BwOp))``."""

    @pytest.mark.parametrize("bias_type", EVERY, ids=lambda t: t.__name__)
    def test_groups_of_heads(self, bias_type):
        """Forward only: xformers' backward pass refuses five axes before it comes to an operator."""
        q, k, v, bias = tensors(bias_type, 5, torch.float32)
        out = xops.memory_efficient_attention(q, k, v, bias, op=(FwOp, BwOp))
        torch.testing.assert_close(out, memory_efficient_attention(q, k, v, bias))

    @pytest.mark.parametrize("axes", [3, 4])
    @pytest.mark.parametrize("bias_type", EVERY, ids=lambda t: t.__name__)
    def test_is_the_function_to_first_order(self, bias_type, axes):
        if axes == 3 and bias_type not in (type(None), torch.Tensor, biases.LowerTriangularMask):
            pytest.skip("xformers refuses this bias without an axis of heads")
        q, k, v, bias = tensors(bias_type, axes, torch.float32)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if isinstance(bias, torch.Tensor):
            leaves.append(bias.requires_grad_())
        results = []
        for out in (
            xops.memory_efficient_attention(q, k, v, bias, op=(FwOp, BwOp)),
            memory_efficient_attention(q, k, v, bias),
        ):
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        torch.testing.assert_close(*results)

    def test_bfloat16_on_a_cpu_is_refused_by_xformers(self):
        """There its tolerance is finer than scores rounded to bfloat16, as eager PyTorch's are."""
        q, k, v, _ = tensors(type(None), dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="bf16 is only supported on A100"):
            xops.memory_efficient_attention(q, k, v, op=(FwOp, BwOp))

    def test_backward_alone_is_found(self):
        q, k, v, _ = tensors(type(None), dtype=torch.float32)
        q.requires_grad_()
        out = xops.memory_efficient_attention(q, k, v, op=(FwOp, None))
        (dq,) = torch.autograd.grad(out.square().sum(), q)
        (expect,) = torch.autograd.grad(plain(q, k, v, None).square().sum(), q)
        torch.testing.assert_close(dq, expect)

    def test_logsumexp(self):
        """``[B, H, Mq]``, of packed sequences side by side."""
        for bias_type in (type(None), biases.BlockDiagonalMask):
            q, k, v, bias = tensors(bias_type, dtype=torch.float32)
            _, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v, bias, op=FwOp)
            scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * K**-0.5
            if bias is not None:
                scores = scores + bias.materialize(scores.shape)
            torch.testing.assert_close(lse, scores.logsumexp(-1))

    def test_scale(self):
        q, k, v, _ = tensors(type(None), dtype=torch.float32)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = xops.memory_efficient_attention(q, k, v, scale=0.3, op=(FwOp, BwOp))
        expect = plain(q, k, v, None, 0.3)
        torch.testing.assert_close(out, expect)
        ours, theirs = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, expect))
        torch.testing.assert_close(ours, theirs)

    def test_second_order_is_refused_by_xformers(self):
        q, k, v, _ = tensors(type(None), dtype=torch.float32)
        q.requires_grad_()
        out = xops.memory_efficient_attention(q, k, v, op=(FwOp, BwOp))
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dq.square().sum().backward()

    def test_biases_that_xformers_would_leave_without_a_gradient(self):
        q, k, v, bias = tensors(biases.LowerTriangularMaskWithTensorBias, dtype=torch.float32)
        bias._bias.requires_grad_()
        q.requires_grad_()
        with pytest.raises(ValueError, match="passes no gradient to the tensor"):
            xops.memory_efficient_attention(q, k, v, bias, op=(FwOp, BwOp))
        own = torch.zeros(B, H, M, M, requires_grad=True)
        q, k, v, _ = tensors(type(None), dtype=torch.float32)
        with pytest.raises(UnsupportedError, match="gives it no gradient"):
            xops.memory_efficient_attention(q, k, v, own, op=(FwOp, BwOp))

    @pytest.mark.parametrize(
        "options", [{"p": 0.5}, {"output_dtype": torch.float64}], ids=lambda x: next(iter(x))
    )
    def test_what_the_pair_does_not_do(self, options):
        q, k, v, _ = tensors(type(None), dtype=torch.float32)
        with pytest.raises(ValueError, match="diversevitF"):
            xops.memory_efficient_attention(q, k, v, op=(FwOp, BwOp), **options)


def test_inside_second_order_a_function_imported_by_name_is_ours():
    own, seen = xops.memory_efficient_attention, xops.fmha.attn_bias.LowerTriangularMask()
    q, k, v, _ = tensors(type(None), value_width=K)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with dvf.second_order():
        out = own(*inputs, attn_bias=seen, scale=0.3)
    wanted = memory_efficient_attention(*inputs, attn_bias=seen, scale=0.3)
    first = [torch.autograd.grad(o.pow(3).sum(), inputs, create_graph=True) for o in (out, wanted)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in f), inputs) for f in first]
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(*second)
