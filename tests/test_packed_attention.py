"""Attention of q, k and v taken apart from one tensor: the same values, the gradient made in one piece."""

import pytest
import torch
from second_order import TAILS, WAYS
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast import UnsupportedError
from diversevit_fast.ops import packed_attention as ops
from diversevit_fast.ops.packed_attention import taken_apart, whole_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _qkv(dtype: torch.dtype = torch.float64, N: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, N, 3, 4, 8, generator=generator).to(dtype).requires_grad_()


def packed(qkv, **options):
    return dvf.attention(*taken_apart(qkv), **options)


def plain(qkv, **options):
    return dvf.attention(*qkv.permute(2, 0, 3, 1, 4).unbind(), **options)


def _ladder(f, qkv, **options):
    y = f(qkv, **options)
    (g,) = torch.autograd.grad(y.sin().sum(), qkv, create_graph=True)
    return y, g, torch.autograd.grad(g.square().sum(), qkv)[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_three_tensors(dtype, causal, backend):
    with dvf.use_backend(backend):
        got, wanted = (
            _ladder(f, _qkv(dtype), is_causal=causal, scale=0.3) for f in (packed, plain)
        )
    assert all(map(torch.equal, got, wanted))
    assert all(x.is_contiguous() for x in got[1:])


def test_same_bits_without_a_compiler(monkeypatch):
    monkeypatch.setenv("DIVERSEVIT_COMPILE", "0")
    assert all(map(torch.equal, _ladder(packed, _qkv()), _ladder(plain, _qkv())))


def test_gradgradcheck():
    assert torch.autograd.gradcheck(packed, (_qkv(N=3),))
    assert torch.autograd.gradgradcheck(packed, (_qkv(N=3),))


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore")
def test_every_way_of_asking_twice(way, tail):
    def stock(qkv):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind())

    wanted = WAYS["autograd.grad"](stock, [_qkv()], tail)
    torch.testing.assert_close(list(way(packed, [_qkv()], tail)), list(wanted))


def test_opcheck():
    qkv = _qkv()
    o, lse = (x.detach() for x in ops.packed_attention_operator(qkv, False, 0.3))
    torch.library.opcheck(ops.packed_attention_operator, (qkv, False, 0.3))
    do = torch.randn_like(o).requires_grad_()
    torch.library.opcheck(ops.packed_attention_backward_operator, (qkv, o, lse, do, False, 0.3))
    given = (qkv.detach(), o, lse, do.detach(), None, torch.randn_like(qkv), False, 0.3)
    torch.library.opcheck(ops.packed_attention_double_backward_operator, given)


def test_the_graph_holds_nothing_between_the_two():
    """No unbinding, permuting or stacking: the gradient is the kernel's own tensor."""
    qkv = _qkv()
    node = packed(qkv.view(qkv.shape)).grad_fn.next_functions[0][0]
    assert type(node).__name__ == "ViewBackward0"


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[..., :1, :], k, v),
        lambda q, k, v: (q * 1, k, v),
        lambda q, k, v: (k, q, v),
        lambda q, k, v: (q, k, taken_apart(_qkv())[2]),
        lambda q, k, v: tuple(x.detach() for x in (q, k, v)),
    ],
    ids=["sliced", "computed with", "swapped", "of another", "detached"],
)
def test_what_is_no_longer_the_whole_is_three_tensors(change):
    qkv = _qkv()
    q, k, v = change(*taken_apart(qkv))
    assert whole_of(q, k, v) is None
    stock = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(dvf.attention(q, k, v), stock)


def test_nothing_is_marked_where_autograd_is_not_alone():
    def marked(qkv):
        parts = taken_apart(qkv)
        assert not any(hasattr(x, "_diversevit_part") for x in parts)
        return parts[0].sum()

    with torch.no_grad():
        marked(_qkv())
    marked(_qkv().detach())
    torch.func.grad(marked)(_qkv())
    with torch.autograd.forward_ad.dual_level():
        marked(_qkv())


def test_no_grad_between_the_two():
    parts = taken_apart(_qkv())
    with torch.no_grad():
        assert not dvf.attention(*parts).requires_grad


def test_a_mask_and_autocast():
    """A mask goes the way of three tensors; a cast leaves the marks behind."""
    qkv, mask = _qkv(torch.float32), torch.randn(9, 9)
    torch.testing.assert_close(packed(qkv, attn_mask=mask), plain(qkv, attn_mask=mask))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(qkv), plain(qkv))


def test_checkpointing():
    qkv = _qkv()
    again = checkpoint(packed, qkv, use_reentrant=False)
    (g,) = torch.autograd.grad(again.sin().sum(), qkv, create_graph=True)
    assert torch.equal(torch.autograd.grad(g.square().sum(), qkv)[0], _ladder(packed, _qkv())[2])


def test_third_derivative_refuses():
    qkv = _qkv()
    first = torch.autograd.grad(packed(qkv).sin().sum(), qkv, create_graph=True)[0]
    second = torch.autograd.grad(first.sin().sum(), qkv, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match=r"twice.*reference\.attention"):
        torch.autograd.grad(second.sum(), qkv)
