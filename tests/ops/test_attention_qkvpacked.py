"""Attention of q, k and v taken apart from one tensor: the same values, the gradient made in one piece."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast import UnsupportedError
from diversevit_fast.ops import attention_qkvpacked as ops
from diversevit_fast.ops.attention_qkvpacked import taken_apart, whole_of
from tests.helpers.second_order import TAILS, WAYS

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
    assert backend == "reference" or all(x.is_contiguous() for x in got[1:])


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
    y = packed(qkv.view(qkv.shape))
    assert type(y.grad_fn.next_functions[0][0]).__name__ == "ViewBackward0"


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
    with pytest.raises(UnsupportedError, match=r"twice.*use_backend\('reference'\)"):
        torch.autograd.grad(second.sum(), qkv)


class TestRecognised:
    """A model's own taking apart, as timm writes it, seen from the attention call."""

    def marked(self, apart, made=None):
        made = torch.nn.Linear(5, 3 * 4 * 8)(torch.randn(2, 9, 5)) if made is None else made
        q, k, v = apart(made)
        ops.recognise(q, k, v, made)
        return whole_of(q, k, v), made

    @staticmethod
    def as_timm(made):
        return made.reshape(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)

    @pytest.mark.parametrize(
        "apart",
        [
            lambda x: x.reshape(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0),
            lambda x: tuple(y.view(2, 9, 4, 8).transpose(1, 2) for y in x.chunk(3, -1)),
            lambda x: tuple(x.view(2, 9, 3, 4, 8)[:, :, i].transpose(1, 2) for i in range(3)),
        ],
        ids=["unbind", "chunk", "index"],
    )
    def test_views(self, apart):
        whole, made = self.marked(apart)
        assert whole is not None
        assert torch.equal(whole.flatten(2), made)

    @pytest.mark.parametrize(
        "apart",
        [
            lambda x: tuple(y.detach() for y in TestRecognised.as_timm(x)),
            lambda x: tuple(y * 1 for y in TestRecognised.as_timm(x)),
            lambda x: tuple(reversed(TestRecognised.as_timm(x))),
            lambda x: x.reshape(2, 9, 3, 8, 4).permute(2, 0, 4, 1, 3).unbind(0),
            lambda x: x.reshape(2, 9, 4, 3, 8).permute(3, 0, 2, 1, 4).unbind(0),
            lambda x: TestRecognised.as_timm(x.view_as(x).clamp_(-9, 9)),
        ],
        ids=["detached", "computed with", "vkq", "heads last", "head by head", "in place"],
    )
    def test_anything_else(self, apart):
        assert self.marked(apart)[0] is None

    def test_without_gradients(self):
        with torch.no_grad():
            assert self.marked(self.as_timm)[0] is None

    def test_a_stock_timm_model(self):
        """The penalty's gradient is the kernel's tensor, the same bits as of three, and nothing is kept."""
        timm = pytest.importorskip("timm")
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=2)
        images = torch.rand(2, 3, 32, 32)
        seen: list[str] = []

        def step():
            diversity = dvf.HeadDiversity(model, layers="all")
            with diversity:
                logits = model(images)
            loss = logits.square().sum() + diversity.penalty(logits)
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            assert diversity._made is None
            return [g for g in grads if g is not None]

        def watched(q, k, v, made):
            recognise(q, k, v, made)
            seen.append("whole" if whole_of(q, k, v) is not None else "three")

        from diversevit_fast.attachment import attachment as attach

        recognise = attach.recognise
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attach, "recognise", watched)
            got = step()
            assert seen[0] == "whole"
            patch.setattr(attach, "recognise", lambda *_: None)
            wanted = step()
        assert all(map(torch.equal, got, wanted))
