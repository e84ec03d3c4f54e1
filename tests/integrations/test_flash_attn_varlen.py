"""flash-attn's signatures for packed sequences, against ``flash_attn_func`` of every sequence by itself, in float64.

That function has its own tests against flash-attn's formula.
"""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.helpers.fake_gpu import json_from_fake_gpu

H, D = 4, 8
QUERIES = [5, 1, 17, 30, 3, 30, 29, 0, 12]
KEYS = [7, 3, 0, 31, 3, 29, 30, 2, 12]


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def tensors(queries, keys, key_heads=H, more=0, dtype=torch.float64):
    """q, k, v with as many more tokens at the end."""
    g = torch.Generator().manual_seed(0)
    sizes = ((sum(queries), H), (sum(keys), key_heads), (sum(keys), key_heads))
    return [
        torch.randn(n + more, heads, D, generator=g, dtype=dtype).requires_grad_()
        for n, heads in sizes
    ]


def one_by_one(q, k, v, queries, keys, slopes=None, **options):
    out, i, j = [], 0, 0
    for number, (n, m) in enumerate(zip(queries, keys, strict=True)):
        given = [x[None] for x in (q[i : i + n], k[j : j + m], v[j : j + m])]
        own = slopes if slopes is None or slopes.ndim == 1 else slopes[number]
        none = q[i : i + n] * 0  # without keys
        out.append(flash_attn_func(*given, alibi_slopes=own, **options)[0] if n and m else none)
        i, j = i + n, j + m
    return torch.cat([*out, q[i:] * 0])


def to_second_order(out, inputs):
    """The value, the gradients and the gradients of their squares."""
    first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    return [out, *first, *second]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
OF_EACH = SLOPES * torch.arange(1, 10)[:, None]
OPTIONS = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "window to the right": {"window_size": (-1, 0)},
    "causal window": {"window_size": (4, 3), "causal": True},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi of sequences": {"alibi_slopes": OF_EACH},
    "alibi of sequences, causal": {"alibi_slopes": OF_EACH, "causal": True},
}


def renamed(options):
    return {"slopes" if name == "alibi_slopes" else name: x for name, x in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("keys", [QUERIES, KEYS], ids=["as many keys", "other keys"])
@pytest.mark.parametrize(("key_heads", "more"), [(H, 0), (2, 3)])
def test_second_order(keys, options, key_heads, more):
    inputs = tensors(QUERIES, keys, key_heads, more)
    where = (starts(QUERIES), starts(keys), max(QUERIES), max(keys))
    ours = to_second_order(flash_attn_varlen_func(*inputs, *where, **options), inputs)
    wanted = one_by_one(*inputs, QUERIES, keys, **renamed(options))
    assert_same(ours, to_second_order(wanted, inputs))


@pytest.mark.parametrize("case", ["plain", "causal", "window", "alibi of sequences"])
def test_packed_layouts(case):
    options = OPTIONS[case]
    q, k, v = tensors(QUERIES, QUERIES, more=2)
    qkv, kv = (torch.stack(x, 1).detach().requires_grad_() for x in ((q, k, v), (k, v)))
    where = (starts(QUERIES), max(QUERIES))
    ours = flash_attn_varlen_qkvpacked_func(qkv, *where, **options)
    wanted = one_by_one(*qkv.unbind(1), QUERIES, QUERIES, **renamed(options))
    assert_same(to_second_order(ours, (qkv,)), to_second_order(wanted, (qkv,)))
    where = (starts(QUERIES), starts(QUERIES), 30, 30)
    ours = flash_attn_varlen_kvpacked_func(q, kv, *where, **options)
    wanted = one_by_one(q, *kv.unbind(1), QUERIES, QUERIES, **renamed(options))
    assert_same(to_second_order(ours, (q, kv)), to_second_order(wanted, (q, kv)))


@pytest.mark.parametrize("lengths", [[], [0, 0], [8], [8, 8, 8]], ids=str)
def test_few_lengths(lengths):
    inputs = tensors(lengths, lengths, more=1)
    where = (starts(lengths), starts(lengths), 8, 8)
    ours = to_second_order(flash_attn_varlen_func(*inputs, *where), inputs)
    wanted = one_by_one(*inputs, lengths, lengths) + 0 * sum(x.sum() for x in inputs)
    assert_same(ours, to_second_order(wanted, inputs))


def test_tokens_of_no_sequence_are_not_read():
    q, k, v = tensors([4, 3], [4, 3], more=2)
    where = (starts([4, 3]), starts([4, 3]), 4, 4)
    wanted = flash_attn_varlen_func(q, k, v, *where)
    for x in (q, k, v):
        x.data[7:] = torch.nan
    assert torch.equal(flash_attn_varlen_func(q, k, v, *where), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_launches_are_bounded(monkeypatch, causal):
    """300 different lengths from 1 to 512: eight calls for each doubling."""
    from diversevit_fast.integrations import flash_attn_varlen as module

    calls = []
    monkeypatch.setattr(module, "attention", lambda q, *_: calls.append(q.shape) or q)
    lengths = torch.randperm(512, generator=torch.Generator().manual_seed(0))[:300].add(1).tolist()
    q = torch.zeros(sum(lengths), 1, 8)
    flash_attn_varlen_func(q, q, q, starts(lengths), starts(lengths), 512, 512, causal=causal)
    assert len(calls) <= 24
    assert sum(shape[0] * shape[2] for shape in calls) < 1.1 * sum(lengths)


def test_memory_of_short_sequences():
    """What the forward pass and the backward pass save is of the tokens' size, not of the batch squared."""
    lengths = [8] * 200 + [9] * 200
    q, k, v = tensors(lengths, lengths, dtype=torch.float32)
    where = (starts(lengths), starts(lengths), 9, 9)
    saved = {}  # by where they lie

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = flash_attn_varlen_func(q, k, v, *where)
        first = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    assert first
    assert sum(x.untyped_storage().nbytes() for x in saved.values()) < 12 * q.nbytes


def test_under_torch_func():
    lengths = [5, 2, 5, 20, 19]
    q, k, v = tensors(lengths, lengths)
    where = (starts(lengths), starts(lengths), 20, 20)

    def ours(q):
        return flash_attn_varlen_func(q, k, v, *where, causal=True).pow(3)

    def theirs(q):
        return one_by_one(q, k, v, lengths, lengths, causal=True).pow(3)

    torch.testing.assert_close(torch.func.jacrev(ours)(q), torch.func.jacrev(theirs)(q))
    directions = torch.randn(3, *q.shape, dtype=q.dtype)

    def products(f):
        return torch.func.vmap(lambda x: torch.func.jvp(f, (q,), (x,))[1])(directions)

    torch.testing.assert_close(products(ours), products(theirs))
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(ours(forward_ad.make_dual(q, directions[0]))).tangent
    torch.testing.assert_close(out, products(theirs)[0])


def test_another_default_device():
    inputs = tensors(QUERIES, KEYS)
    where = (starts(QUERIES), starts(KEYS), 30, 31)
    wanted = flash_attn_varlen_func(*inputs, *where)
    with torch.device("meta"):
        assert torch.equal(flash_attn_varlen_func(*inputs, *where), wanted)


def test_autocast():
    lengths = [5, 2]
    q, k, v = tensors(lengths, lengths, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_varlen_func(q, k, v, starts(lengths), starts(lengths), 5, 5)
    assert out.dtype == torch.bfloat16
    wanted = one_by_one(q, k, v, lengths, lengths)
    torch.testing.assert_close(out.float(), wanted, rtol=0.02, atol=0.02)
    grads, wanted = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, wanted))
    torch.testing.assert_close(grads, wanted, rtol=0.02, atol=0.02)


GOOD = {"cu_seqlens_q": [0, 4, 7], "cu_seqlens_k": [0, 4, 7], "max_seqlen_q": 4, "max_seqlen_k": 4}
BAD = {
    "floats": (
        {"cu_seqlens_q": [0.0, 7.0]},
        r"cu_seqlens_q: expected \[sequences \+ 1\] of torch.int32",
    ),
    "axes": ({"cu_seqlens_k": [[0, 7]]}, r"cu_seqlens_k: expected .* got \[1, 2\]"),
    "count": (
        {"cu_seqlens_k": [0, 7]},
        "cu_seqlens_q and cu_seqlens_k: expected one length, got 3 and 2",
    ),
    "start": ({"cu_seqlens_q": [1, 4, 7]}, r"cu_seqlens_q: expected 0 first.* got \[1, 4, 7\]"),
    "order": ({"cu_seqlens_k": [0, 8, 7]}, r"cu_seqlens_k: expected .* got \[0, 8, 7\]"),
    "more than there are": (
        {"cu_seqlens_q": [0, 4, 8]},
        "cu_seqlens_q: expected 7 tokens at most, got 8",
    ),
    "longest": (
        {"max_seqlen_k": 3},
        "max_seqlen_k: expected 4 or more, as cu_seqlens_k says, got 3",
    ),
    "slopes": ({"alibi_slopes": SLOPES.expand(3, 4)}, r"alibi_slopes: expected \[4\] or \[2, 4\]"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_lengths(change, message):
    options = {
        name: torch.tensor(x) if isinstance(x, list) else x for name, x in (GOOD | change).items()
    }
    with pytest.raises(UsageError, match=message):
        flash_attn_varlen_func(*tensors([4, 3], [4, 3]), **options)


@pytest.mark.parametrize(
    "option",
    [{"softcap": 30.0}, {"return_attn_probs": True}, {"block_table": torch.zeros(2, 1)}],
    ids=lambda x: next(iter(x)),
)
def test_what_is_refused(option):
    q, k, v = tensors([4, 3], [4, 3])
    where = (starts([4, 3]), starts([4, 3]), 4, 4)
    with pytest.raises(UnsupportedError, match=next(iter(option))):
        flash_attn_varlen_func(q, k, v, *where, **option)


class Attention(nn.Module):
    def __init__(self, lengths):
        super().__init__()
        self.starts, self.num_heads = starts(lengths), H
        self.qkv, self.proj = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)

    def forward(self, x):
        qkv = self.qkv(x).view(-1, 3, H, D)
        return self.proj(flash_attn_varlen_qkvpacked_func(qkv, self.starts, 5).flatten(1))


def test_heads_of_sequences_of_one_length_are_captured():
    model, x = Attention([5, 5]), torch.randn(10, H * D)
    heads = dvf.capture_heads(model)
    with heads:
        out = model(x)
    assert heads[0].shape == (2, H, 5, D)
    torch.testing.assert_close(model.proj(heads[0].transpose(1, 2).reshape(10, -1)), out)


@pytest.mark.parametrize("lengths", [[5, 4], [5, 0]], ids=str)
@pytest.mark.parametrize(
    "context",
    [dvf.capture_heads, dvf.HeadDiversity, lambda model: dvf.keep_heads(model, {0: [1]})],
    ids=["capture_heads", "HeadDiversity", "keep_heads"],
)
def test_heads_of_sequences_of_several_lengths_are_refused(context, lengths):
    model = Attention(lengths)
    with (
        context(model),
        pytest.raises(UnsupportedError, match="packed sequences of several lengths"),
    ):
        model(torch.randn(sum(lengths), H * D))


def test_dropout():
    """The weights that stay are divided by 1 - p; a seed draws the same ones in all orders."""
    lengths = [5, 2, 5, 20, 19]
    q, k, v = tensors(lengths, lengths)
    where = (starts(lengths), starts(lengths), 20, 20)

    def dropped(q):
        torch.manual_seed(3)
        return flash_attn_varlen_func(q, k, v, *where, 0.4, causal=True)

    assert torch.autograd.gradcheck(dropped, q, fast_mode=True)
    assert torch.autograd.gradgradcheck(dropped, q, fast_mode=True)
    qkv = torch.stack((q, k, v), 1)
    torch.manual_seed(3)
    out = flash_attn_varlen_qkvpacked_func(qkv, where[0], 20, 0.4, causal=True)
    torch.testing.assert_close(out, dropped(q))
    mean = sum(flash_attn_varlen_func(q, k, v, *where, 0.4).detach() for _ in range(400)) / 400
    wanted = flash_attn_varlen_func(q, k, v, *where).detach()
    assert (mean - wanted).square().mean() < 0.01 * wanted.square().mean()


def test_nested_tensors_are_sent_here():
    nested = torch.nested.nested_tensor([torch.ones(n, 2, 8) for n in (3, 5)], layout=torch.jagged)
    q = nested.transpose(1, 2)
    with (
        dvf.second_order(),
        pytest.raises(UsageError, match=r"got nested; .*plain tensors for flash_attn_varlen_func"),
    ):
        F.scaled_dot_product_attention(q, q, q)


ON_A_GPU = """
import json, torch
from benchmarks.fake_gpu.counters import counting
from diversevit_fast.integrations.flash_attn import flash_attn_varlen_func

lengths = list(range(10, 60)) * 2
starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
q, k, v = (
    torch.zeros(sum(lengths), 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
)

def step():
    out = flash_attn_varlen_func(q, k, v, starts, starts, 59, 59)
    first = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    torch.autograd.grad(sum(x.sum() for x in first), (q, k, v))

step()
with counting() as counted:
    step()
print(json.dumps(counted))
"""


def test_launches_and_waits_on_a_gpu():
    """100 sequences in four groups; with lengths that the host knows nothing waits."""
    counted = json_from_fake_gpu(ON_A_GPU)
    assert counted["waits"] == 0
    assert counted["triton"] <= 4 * 5
    assert counted["kernels"] <= 80
