"""Dropout in the Triton attention kernels: the bits of the definition, whichever kernel and tile they are drawn in."""

from typing import Any, NamedTuple

import pytest
import torch

from diversevit_kernels.common.contracts import AttentionBackward, AttentionDoubleBackward
from diversevit_kernels.common.dropout import kept, kept_by, row_words
from tests.helpers.attention_cases import SEED

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from diversevit_kernels.triton import attention  # noqa: E402
from diversevit_kernels.triton.attention import dropout  # noqa: E402
from diversevit_kernels.triton.runtime import launch  # noqa: E402

SEEDS = [SEED, 0, 1, -1, 1 << 32, -(1 << 63)]
SIZES = {  # B, H, Nq, Nk
    "tiles": (1, 2, 40, 53),
    "many heads": (2, 3, 40, 53),
    "all keys in a tile": (1, 2, 40, 31),
    "few queries": (2, 2, 16, 53),
    "one query": (3, 2, 1, 40),
}


def numbers(*shape, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)


def equal_weights(shape, width, dtype, device):
    """q, k and v of these sizes: a query gives all keys the same weight."""
    B, H, Nq, Nk = shape
    q = torch.zeros(B, H, Nq, 16, dtype=dtype, device=device)
    k = torch.ones(B, H, Nk, 16, dtype=dtype, device=device)
    return q, k, numbers(B, H, Nk, width, dtype=dtype, device=device)


def identity(n, like):
    return torch.eye(n, dtype=like.dtype, device=like.device).expand(*like.shape[:2], n, n)


def assert_is_dropped(found, seed, shape, p):
    """P ∘ Z of equal weights: zeros where the definition has them, and 1 / (1 − p) times the weight elsewhere."""
    keep = kept_by(seed, shape, p)
    assert torch.equal(found != 0, keep)
    expected = torch.full_like(found, 1 / (1 - p) / shape[-1])
    torch.testing.assert_close(found, expected.where(keep, 0))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_bits_are_those_of_the_definition(dtype, size, p, device):
    """Read off forward and backward, of which v or do is the identity."""
    shape = SIZES[size]
    _, _, Nq, Nk = shape
    seed = torch.tensor([SEED], device=device)
    q, k, v = equal_weights(shape, Nq, dtype, device)
    o, _ = attention.attention_forward(q, k, identity(Nk, k), None, seed, False, 1.0, p)
    assert_is_dropped(o, seed, shape, p)
    o, softmax = attention.attention_forward(q, k, v, None, seed, False, 1.0, p)
    given = (q, k, v, None, seed, o, softmax, identity(Nq, q), False, 1.0, p, False)
    dv = attention.attention_backward(AttentionBackward(*given))[2]
    assert_is_dropped(dv.mT, seed, shape, p)


@pytest.mark.parametrize("number", SEEDS)
def test_all_bits_of_a_seed_count(number, device):
    shape, seed = SIZES["few queries"], torch.tensor([number], device=device)
    q, k, _ = equal_weights(shape, 1, torch.float32, device)
    v = identity(shape[-1], k)
    o, _ = attention.attention_forward(q, k, v, None, seed, False, 1.0, 0.5)
    assert_is_dropped(o, seed, shape, 0.5)


class Arguments(NamedTuple):
    H: int
    Nq: int
    dropout: Any


class Constants(NamedTuple):
    ACC: tl.dtype


@triton.jit
def factors_kernel(
    args, out_ptr, b, first_row, first_key, const: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    rows = first_row + tl.arange(0, M).to(tl.int64)
    keys = (first_key + tl.arange(0, N).to(tl.int64))[None, :]
    words = dropout.row_words(args, None, b, 0, rows)
    z = dropout.factors(args, words, keys, const)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], z)


def factors_of(seed, p, Nq, b, first_row, first_key, M=16, N=32):
    """The tile of Z that a kernel makes, for M rows and N keys."""
    out = torch.empty(M, N, dtype=torch.float64, device=seed.device)
    args = Arguments(1, Nq, dropout.dropout_of(seed, p))
    const = launch.known({"const": Constants(tl.float64)})
    factors_kernel[(1,)](args, out, b, first_row, first_key, **const, M=M, N=N)
    return out


@pytest.mark.parametrize("p", [1e-11, 0.3, 0.5, 1 - 2.0**-32])
@pytest.mark.parametrize(
    ("b", "first_row", "first_key"), [(3, 2**34 + 5, 0), (0, 2**32 - 7, 2**31 - 7), (0, 0, 2**16)]
)
def test_rows_and_keys_beyond_32_bits(b, first_row, first_key, p, device):
    Nq, seed = 2**35, torch.tensor([SEED], device=device)
    out = factors_of(seed, p, Nq, b, first_row, first_key)
    rows = b * Nq + first_row + torch.arange(16, device=device)[:, None]
    keys = (first_key + torch.arange(32, device=device)).to(torch.int32)
    keep = kept(row_words(seed, rows), keys, p)
    assert torch.equal(out != 0, keep)
    torch.testing.assert_close(out, keep.double() / (1 - p), rtol=1e-15, atol=0)


def test_a_weight_at_the_threshold_is_kept(device):
    """Its random number is the largest threshold at which the definition keeps it."""
    seed = torch.tensor([SEED], device=device)
    words = row_words(seed, torch.tensor([3], device=device))
    key = torch.tensor([5], dtype=torch.int32, device=device)
    bits, above = 0, 2**32
    while above - bits > 1:
        middle = (bits + above) // 2
        bits, above = (middle, above) if kept(words, key, middle / 2**32) else (bits, middle)
    assert factors_of(seed, bits / 2**32, 16, 0, 0, 0)[3, 5] > 0
    assert factors_of(seed, above / 2**32, 16, 0, 0, 0)[3, 5] == 0


@pytest.mark.parametrize("p", [0.0, 1e-11, 0.1, 0.5, 0.75, 1 - 2.0**-32])
def test_triton_compiles_one_kernel_for_every_probability(p):
    """It would compile another for an integer that is 1 or a multiple of 16, or that has 32 bits."""
    made = dropout.dropout_of(torch.tensor([SEED]), p)
    assert made is not None
    for x in made[1:]:
        assert x % 2 == 1
        assert 2**32 < x < 2**63


@pytest.mark.parametrize("Nk", [12, 53])
@pytest.mark.parametrize("Nq", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_key_with_all_the_weight_leaves_no_gradient(dtype, Nq, Nk, device):
    """Of few queries: dP − Δ is exactly 0 there, although o is v / (1 − p), rounded."""
    q, k, v = (numbers(2, 2, n, 16, dtype=dtype, device=device) for n in (Nq, Nk, Nk))
    k[:, :, 3] = 40 * torch.ones_like(k[:, :, 3])
    q = q.abs() + 1
    seed = torch.tensor([SEED], device=device)
    do = numbers(2, 2, Nq, 16, dtype=dtype, device=device)
    o, softmax = attention.attention_forward(q, k, v, None, seed, False, 1.0, 0.3)
    assert o.count_nonzero() > 0
    first = (q, k, v, None, seed, o, softmax, do)
    dq, dk, dv, _ = attention.attention_backward(AttentionBackward(*first, False, 1.0, 0.3, False))
    second = AttentionDoubleBackward(*first, dq, q, k, None, None, False, 1.0, 0.3, False)
    gq, gk, _, _, _ = attention.attention_double_backward(second)
    assert dv.count_nonzero() > 0
    for x in (dq, dk, gq, gk):
        assert x.count_nonzero() == 0


@pytest.mark.parametrize("size", [name for name in SIZES if name != "many heads"])
def test_dropout_takes_no_launch_of_its_own(size, device):
    """Many heads apart, of which one program has registers for a whole one without dropout only."""
    B, H, Nq, Nk = SIZES[size]
    q, k, v = (torch.empty(B, H, n, 16, device=device) for n in (Nq, Nk, Nk))
    softmax = torch.empty(B, H, 2, Nq, device=device)

    def names(seed, p):
        first = (q, k, v, None, seed, q, softmax, q)
        options = False, 1.0, p
        with launch.recording(run=False) as launches:
            attention.attention_forward(q, k, v, None, seed, *options)
            attention.attention_backward(AttentionBackward(*first, *options, False))
            attention.attention_double_backward(
                AttentionDoubleBackward(*first, q, q, k, v, None, *options, False)
            )
        return [one.name for one in launches]

    assert names(torch.empty(1, dtype=torch.int64, device=device), 0.3) == names(None, 0.0)
