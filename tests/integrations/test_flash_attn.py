"""flash-attn's signatures, against its documented formula in float64; and its functions inside ``second_order``.

flash-attn needs a GPU and a compiler to be installed. A module of the same layout stands in for it.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.integrations import entry_points
from diversevit_fast.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)

B, H, D = 2, 4, 8


def tensors(queries=5, keys=5, key_heads=H, value_width=D, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    sizes = ((queries, H, D), (keys, key_heads, D), (keys, key_heads, value_width))
    return [torch.randn(B, *s, generator=g, dtype=dtype).requires_grad_() for s in sizes]


def plain(q, k, v, scale=None, causal=False, window=(-1, -1), slopes=None):
    """Score by score, as flash-attn's README defines them; rows that attend to nothing are zero."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    left, right = window[0], 0 if causal else window[1]
    shift = k.shape[1] - q.shape[1]
    seen = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    bias = torch.zeros(B, H, q.shape[1], k.shape[1], dtype=torch.float64)
    for i in range(q.shape[1]):
        for j in range(k.shape[1]):
            before, after = i + shift - j, j - i - shift
            seen[i, j] = (left < 0 or before <= left) and (right < 0 or after <= right)
            if slopes is not None:
                bias[:, :, i, j] = -slopes * abs(before)
    weights = (scores + bias).masked_fill(~seen, -1e300).softmax(-1).masked_fill(~seen, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def to_second_order(out, inputs):
    """The value, the gradients and the gradients of their squares."""
    first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return [out, *first, *second]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
CASES = {
    "plain": ({}, {}),
    "scale": ({}, {"softmax_scale": 0.7}),
    "causal": ({}, {"causal": True}),
    "causal, more keys": ({"queries": 3, "keys": 7}, {"causal": True}),
    "causal, fewer keys": ({"queries": 6, "keys": 4}, {"causal": True}),
    "grouped heads": ({"key_heads": 2}, {}),
    "grouped heads, more keys": ({"key_heads": 1, "keys": 6}, {"causal": True}),
    "wide values": ({"value_width": 5}, {}),
    "window": ({}, {"window_size": (2, 1)}),
    "window to the left": ({"keys": 8}, {"window_size": (1, -1)}),
    "window to the right": ({"keys": 8}, {"window_size": (-1, 0)}),
    "causal window": ({}, {"causal": True, "window_size": (1, 3)}),
    "alibi": ({}, {"alibi_slopes": SLOPES}),
    "alibi, causal, more keys": ({"keys": 7}, {"alibi_slopes": SLOPES, "causal": True}),
    "alibi of samples": ({}, {"alibi_slopes": torch.stack((SLOPES, SLOPES.flip(0)))}),
}


def formula(options):
    names = {"softmax_scale": "scale", "window_size": "window", "alibi_slopes": "slopes"}
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
def test_second_order(sizes, options):
    q, k, v = tensors(**sizes)
    ours = to_second_order(flash_attn_func(q, k, v, **options), (q, k, v))
    assert_same(ours, to_second_order(plain(q, k, v, **formula(options)), (q, k, v)))


@pytest.mark.parametrize("case", ["plain", "scale", "causal", "window", "alibi"])
def test_packed_layouts(case):
    options = CASES[case][1]
    q, k, v = tensors()
    qkv = torch.stack((q, k, v), 2).detach().requires_grad_()
    kv = torch.stack((k, v), 2).detach().requires_grad_()
    wanted = to_second_order(plain(*qkv.unbind(2), **formula(options)), (qkv,))
    assert_same(to_second_order(flash_attn_qkvpacked_func(qkv, **options), (qkv,)), wanted)
    wanted = to_second_order(plain(q, *kv.unbind(2), **formula(options)), (q, kv))
    assert_same(to_second_order(flash_attn_kvpacked_func(q, kv, **options), (q, kv)), wanted)


REFUSED = {"softcap": 30.0, "return_attn_probs": True}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    q, k, v = tensors()
    option = {name: REFUSED[name]}
    with pytest.raises(UnsupportedError, match=name):
        flash_attn_func(q, k, v, **option)
    with pytest.raises(UnsupportedError, match=name):
        flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **option)


def test_dropout():
    """The weights that ``dvf.attention`` drops, in the plain and in the packed form."""
    q, k, v = tensors()
    torch.manual_seed(0)
    wanted = dvf.attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.5).transpose(1, 2)
    for attend, given in (
        (flash_attn_func, (q, k, v)),
        (flash_attn_qkvpacked_func, (torch.stack((q, k, v), 2),)),
    ):
        torch.manual_seed(0)
        torch.testing.assert_close(attend(*given, dropout_p=0.5), wanted)


def test_slopes_of_another_shape():
    with pytest.raises(UsageError, match=r"alibi_slopes: expected \[4\] or \[2, 4\], got \[3\]"):
        flash_attn_func(*tensors(), alibi_slopes=SLOPES[:3])


STAND_IN = """
import torch

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                deterministic, return_softmax, is_grad_enabled):
        raise AssertionError("the library's own kernel ran")

class FlashAttnFunc(Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                deterministic, return_softmax, is_grad_enabled):
        raise AssertionError("the library's own kernel ran")

class FlashAttnQKVPackedFunc(Function):
    pass

class FlashAttnVarlenFunc(Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                return_softmax, block_table, is_grad_enabled):
        raise AssertionError("the library's own kernel ran")

class FlashAttnLaterFunc(Function):
    pass

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):
    return FlashAttnFunc.apply(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap,
                               alibi_slopes, deterministic, return_attn_probs, torch.is_grad_enabled())

def flash_attn_qkvpacked_func(qkv, causal=False):
    return FlashAttnQKVPackedFunc.apply(qkv, 0.0, None, causal, (-1, -1), 0.0, None, False, False,
                                        torch.is_grad_enabled())

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                           softcap=0.0, alibi_slopes=None, deterministic=False,
                           return_attn_probs=False, block_table=None):
    return FlashAttnVarlenFunc.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                     dropout_p, softmax_scale, causal, window_size, softcap,
                                     alibi_slopes, deterministic, return_attn_probs, block_table,
                                     torch.is_grad_enabled())

def flash_attn_later_func(q, k, v):
    return FlashAttnLaterFunc.apply(q, k, v)
"""


def stand_in(name="flash_attn.flash_attn_interface"):
    """A module with the functions and classes of flash-attn 2.8, whose kernels fail."""
    module = ModuleType(name)
    exec(STAND_IN, vars(module))
    return module


@pytest.fixture
def flash_attn():
    module = stand_in()
    entry_points.watch_flash_attn(module)
    return module


def test_functions_imported_by_name_run_inside_a_block(flash_attn):
    q, k, v = tensors()
    with dvf.second_order():
        out = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(2, -1))
        packed = flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True)
    wanted = plain(q, k, v, causal=True, window=(2, -1))
    assert_same(to_second_order(out, (q, k, v)), to_second_order(wanted, (q, k, v)))
    torch.testing.assert_close(packed, plain(q, k, v, causal=True))


def test_packed_sequences_run_inside_a_block(flash_attn):
    q, k, v = (x.flatten(0, 1) for x in tensors())
    starts = torch.tensor([0, 5, 10], dtype=torch.int32)
    with dvf.second_order():
        out = flash_attn.flash_attn_varlen_func(q, k, v, starts, starts, 5, 5, causal=True)
    torch.testing.assert_close(out.view(B, 5, H, D), plain(*tensors(), causal=True))


def test_outside_they_are_the_librarys_own(flash_attn):
    with pytest.raises(AssertionError, match="own kernel ran"):
        flash_attn.flash_attn_func(*tensors())
    with (
        dvf.second_order(),
        torch.no_grad(),
        pytest.raises(AssertionError, match="own kernel ran"),
    ):
        flash_attn.flash_attn_func(*tensors())


def test_functions_without_a_replacement_are_refused_inside(flash_attn):
    with dvf.second_order(), pytest.raises(UnsupportedError, match="FlashAttnLaterFunc"):
        flash_attn.flash_attn_later_func(*tensors())


def test_version_3_is_refused_inside():
    module = stand_in("flash_attn_interface")
    entry_points.watch_flash_attn(module)
    with dvf.second_order(), pytest.raises(UnsupportedError, match="FlashAttnFunc"):
        module.flash_attn_func(*tensors())


def test_a_module_is_watched_once_it_is_imported(monkeypatch):
    from diversevit_fast.attachment import second_order

    module = stand_in()
    monkeypatch.setitem(second_order._libraries, module.__name__, entry_points.watch_flash_attn)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with dvf.second_order():
        module.flash_attn_func(*tensors())
    assert module.__name__ not in second_order._libraries


def test_heads_of_such_a_model_are_captured(flash_attn):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv = H, nn.Linear(H * D, 3 * H * D)
            self.proj = nn.Linear(H * D, H * D)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).unbind(2)
            return self.proj(flash_attn.flash_attn_func(q, k, v).flatten(2))

    model = Attention().double()
    x = torch.randn(B, 5, H * D, dtype=torch.float64)
    heads = dvf.capture_heads(model)
    with dvf.second_order(), heads:
        model(x)
    assert heads[0].shape == (B, H, 5, D)
