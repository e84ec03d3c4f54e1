"""Attention of q, k and v in one tensor: the same values as of three, the gradient made in one piece."""

import importlib

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast import UnsupportedError
from diversevit_fast.ops.attention_qkvpacked import split_qkv
from tests.helpers.second_order import TAILS, WAYS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _qkv(dtype: torch.dtype = torch.float64, N: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, N, 3, 4, 8, generator=generator).to(dtype).requires_grad_()


ops = importlib.import_module("diversevit_fast.ops.attention_qkvpacked")
packed = dvf.attention_qkvpacked


def plain(qkv, queries=None, **options):
    q, k, v = split_qkv(qkv)
    return dvf.attention(q[:, :, :queries], k, v, **options).transpose(1, 2)


def _to_second_order(f, qkv, **options):
    y = f(qkv, **options)
    (g,) = torch.autograd.grad(y.sin().sum(), qkv, create_graph=True)
    return y, g, torch.autograd.grad(g.square().sum(), qkv)[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_three_tensors(dtype, causal, backend):
    with dvf.use_backend(backend):
        got, wanted = (
            _to_second_order(f, _qkv(dtype), is_causal=causal, scale=0.3) for f in (packed, plain)
        )
    assert all(map(torch.equal, got, wanted))
    assert backend == "reference" or all(x.is_contiguous() for x in got[1:])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_the_first_tokens_alone(dtype, queries, causal, backend):
    options = {"is_causal": causal, "scale": 0.3, "queries": queries}
    with dvf.use_backend(backend):
        got, wanted = (_to_second_order(f, _qkv(dtype), **options) for f in (packed, plain))
    assert got[0].shape == (2, queries, 4, 8)
    assert got[0].is_contiguous()
    assert all(map(torch.equal, got, wanted))


def test_same_bits_without_a_compiler(monkeypatch):
    monkeypatch.setenv("DIVERSEVIT_COMPILE", "0")
    for queries in (None, 2):
        got, wanted = (_to_second_order(f, _qkv(), queries=queries) for f in (packed, plain))
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("queries", [None, 1, 2])
def test_gradgradcheck(queries):
    def attend(qkv):
        return packed(qkv, queries=queries)

    assert torch.autograd.gradcheck(attend, (_qkv(N=3),))
    assert torch.autograd.gradgradcheck(attend, (_qkv(N=3),))


@pytest.mark.parametrize("queries", [None, 2])
@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore")
def test_every_way_of_asking_twice(way, tail, queries):
    def stock(qkv):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            parts = split_qkv(qkv, queries)
            return F.scaled_dot_product_attention(*parts).transpose(1, 2)

    def ours(qkv):
        return packed(qkv, queries=queries)

    wanted = WAYS["autograd.grad"](stock, [_qkv()], tail)
    torch.testing.assert_close(list(way(ours, [_qkv()], tail)), list(wanted))


@pytest.mark.parametrize("queries", [None, 2])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_opcheck(queries, p):
    qkv, seed = _qkv(), torch.tensor([5]) if p else None
    given = (qkv, seed, False, 0.3, p, queries)
    o, lse = (x.detach() for x in ops.attention_qkvpacked_operator(*given))
    torch.library.opcheck(ops.attention_qkvpacked_operator, given)
    do = torch.randn_like(o).requires_grad_()
    given = (qkv, seed, o, lse, do, False, 0.3, p)
    torch.library.opcheck(ops.attention_qkvpacked_backward_operator, given)
    given = (qkv.detach(), seed, o, lse, do.detach(), None, torch.randn_like(qkv), False, 0.3, p)
    torch.library.opcheck(ops.attention_qkvpacked_double_backward_operator, given)


def test_the_graph_holds_nothing_between_the_two():
    """No unbinding, permuting or stacking: the gradient is the kernel's own tensor."""
    qkv = _qkv()
    y = packed(qkv.view(qkv.shape))
    assert type(y.grad_fn.next_functions[0][0]).__name__ == "ViewBackward0"


def test_shape_and_layout():
    """Tokens first, as in FlashAttention's function, and contiguous."""
    qkv = _qkv()
    assert packed(qkv).shape == (2, 9, 4, 8)
    assert packed(qkv).is_contiguous()
    with dvf.use_backend("reference"):
        assert packed(qkv).is_contiguous()


def test_any_strides():
    dense, spread = _qkv(), _qkv().detach().repeat_interleave(2, -1).movedim(1, -2)
    strided = spread.movedim(-2, 1)[..., ::2].requires_grad_()
    assert not strided.is_contiguous()
    assert all(map(torch.equal, _to_second_order(packed, strided), _to_second_order(packed, dense)))


def test_no_grad_and_empty_batch():
    with torch.no_grad():
        assert not packed(_qkv()).requires_grad
    empty = _qkv()[:0].detach().requires_grad_()
    (g,) = torch.autograd.grad(packed(empty).sum(), empty)
    assert g.shape == empty.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    qkv = _qkv(torch.float32)
    with torch.autocast("cpu", dtype):
        ours, three = packed(qkv), plain(qkv)
        inner = [
            torch.autograd.grad(y.sin().sum(), qkv, create_graph=True)[0] for y in (ours, three)
        ]
    assert ours.dtype == dtype
    assert torch.equal(ours, three)
    outer = [torch.autograd.grad(g.square().sum(), qkv)[0] for g in inner]
    for one, two in (inner, outer):
        assert one.dtype == torch.float32
        assert torch.equal(one, two)


class TestTransforms:
    """torch.func, forward mode and compilers agree with three tensors."""

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, x: torch.func.grad(lambda y: f(y).sin().sum())(x),
            lambda f, x: torch.func.hessian(lambda y: f(y).sin().sum())(x),
            lambda f, x: torch.func.jvp(f, (x,), (x.flip(0),))[1],
            lambda f, x: torch.func.vmap(f)(torch.stack([x, x.flip(0)])),
        ],
        ids=["grad", "hessian", "jvp", "vmap"],
    )
    def test_functorch(self, transform):
        qkv = _qkv(N=3).detach()
        torch.testing.assert_close(transform(packed, qkv), transform(plain, qkv))
        one, two = (lambda qkv, f=f: f(qkv, queries=2) for f in (packed, plain))
        torch.testing.assert_close(transform(one, qkv), transform(two, qkv))

    def test_batched_cotangents(self):
        qkv = _qkv(N=3)
        basis = torch.randn(5, 2, 3, 4, 8, dtype=qkv.dtype)
        one, two = (
            torch.autograd.grad(f(qkv), qkv, basis, is_grads_batched=True)[0]
            for f in (packed, plain)
        )
        torch.testing.assert_close(one, two)

    def test_compiled(self):
        torch._dynamo.reset()
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        qkv = _qkv()
        assert torch.equal(compiled(qkv), packed(qkv))
        (g,) = torch.autograd.grad(compiled(qkv).sin().sum(), qkv)
        torch.testing.assert_close(g, torch.autograd.grad(packed(qkv).sin().sum(), qkv)[0])

    def test_a_tensor_subclass_and_a_mode_see_it(self):
        class Seen(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        seen = []
        with Seen():
            packed(_qkv().detach())
        assert seen[-1] is dvf.attention_qkvpacked


BAD = {
    "not a tensor": (lambda x: x.tolist(), {}, "qkv: expected a tensor, got list"),
    "integer": (lambda x: x.long(), {}, "qkv: expected a floating dtype"),
    "axes": (lambda x: x.flatten(2), {}, "qkv: expected shape [B, N, 3, H, d]"),
    "no triple": (lambda x: x[:, :, :2], {}, "qkv: expected shape [B, N, 3, H, d]"),
    "no tokens": (lambda x: x[:, :0], {}, "qkv: expected shape [B, N, 3, H, d]"),
    "scale": (lambda x: x, {"scale": float("inf")}, "scale: expected a finite number"),
    **{
        f"{n} queries": (
            lambda x: x,
            {"queries": n},
            f"queries: expected a whole number from 1 to 9, the tokens of qkv, got {n!r}",
        )
        for n in (0, 10, -1, 1.0, True)
    },
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    change, options, message = BAD[name]
    with pytest.raises(dvf.UsageError) as failure:
        packed(change(_qkv().detach()), **options)
    assert str(failure.value).startswith(message), failure.value
    assert "\n" not in str(failure.value)


def test_a_mask_is_no_argument():
    with pytest.raises(TypeError, match="attn_mask"):
        packed(_qkv(), attn_mask=torch.zeros(9, 9))


def test_checkpointing():
    qkv = _qkv()
    again = checkpoint(packed, qkv, use_reentrant=False)
    (g,) = torch.autograd.grad(again.sin().sum(), qkv, create_graph=True)
    assert torch.equal(
        torch.autograd.grad(g.square().sum(), qkv)[0], _to_second_order(packed, _qkv())[2]
    )


def test_third_derivative_refuses():
    qkv = _qkv()
    first = torch.autograd.grad(packed(qkv).sin().sum(), qkv, create_graph=True)[0]
    second = torch.autograd.grad(first.sin().sum(), qkv, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match=r"twice.*use_backend\('reference'\)"):
        torch.autograd.grad(second.sum(), qkv)
