"""The random bits of attention dropout: published vectors, one definition in plain integers, and statistics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diversevit_fast.ops import reference
from diversevit_kernels.common.dropout import kept, kept_by, philox, row_words, threshold
from diversevit_kernels.cpu.attention import dispatch as cpu

PROBABILITIES = (1e-3, 0.1, 0.5, 0.9)
LOW = 0xFFFFFFFF

# counter, key, result: kat_vectors of Random123
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW,) * 4, (LOW,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("vector", VECTORS, ids=["zeros", "ones", "pi"])
def test_published_vectors(vector):
    counter, key, wanted = (tuple(map(torch.tensor, part)) for part in vector)
    assert philox(counter, key) == wanted


def plain_words(seed, row):
    c, (k0, k1) = [row & LOW, row >> 32, 0, 0], (seed & LOW, seed >> 32 & LOW)
    for _ in range(10):
        one, two = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [two >> 32 ^ c[1] ^ k0, two & LOW, one >> 32 ^ c[3] ^ k1, one & LOW]
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return c[:2]


def plain_bits(seed, row, key):
    """(55)-(56) in Python's integers."""
    a, c = plain_words(seed, row)
    x = key * 0x9E3779B9 + a & LOW
    x = (x ^ x >> 16) * 0x21F0AAAD & LOW
    x = ((x ^ x >> 15) + c) * 0x735A2D97 & LOW
    return x ^ x >> 15


def plain_kept(seed, row, key, p):
    return plain_bits(seed, row, key) >= int(p * 2**32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**62),
    st.integers(0, 2**31 - 8),
    st.floats(0.0, 1.0, exclude_max=True),
)
def test_equals_plain_integers(seed, row, key, p):
    words = row_words(torch.tensor([seed]), torch.tensor([[row], [row + 1]]))
    keys = torch.arange(key, key + 8, dtype=torch.int32)
    wanted = [[plain_kept(seed, r, int(j), p) for j in keys] for r in (row, row + 1)]
    assert kept(words, keys, p).tolist() == wanted


def test_rows_are_numbered_through_samples_heads_and_queries():
    found = kept_by(torch.tensor([7]), (2, 3, 5, 4), 0.5)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 4, 3), (1, 0, 3, 2), (0, 2, 1, 1)):
        assert found[b, h, i, j].item() == plain_kept(7, (b * 3 + h) * 5 + i, j, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernels", [cpu, reference])
def test_a_weight_at_the_threshold_is_kept(kernels, dtype):
    """Of two probabilities that differ by 2^-32, one keeps it and the other does not."""
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    bits = plain_bits(7, 0, 0)
    for p, wanted in ((bits / 2**32, True), ((bits + 1) / 2**32, False)):
        o, _ = kernels.attention_forward(one, one, one, None, torch.tensor([7]), False, 1.0, p)
        assert (o != 0).item() is wanted


def test_compiled():
    """Inductor's C++ takes it that signed integers do not wrap around."""
    seed, shape = torch.tensor([-5]), (2, 3, 40, 50)
    found = torch.compile(lambda seed: kept_by(seed, shape, 0.3))(seed)
    assert torch.equal(found, kept_by(seed, shape, 0.3))


def test_the_ends():
    assert threshold(0.0) == 0
    assert threshold(1e-12) == 0
    assert threshold(1 - 2.0**-53) == LOW
    assert kept_by(torch.tensor([1]), (1, 1, 20, 20), 0.0).all()
    assert not kept_by(torch.tensor([1]), (1, 1, 20, 20), 1 - 2.0**-53).any()


SHAPE = (4, 4, 128, 512)


@pytest.fixture(params=PROBABILITIES)
def p(request):
    return request.param


def centred(seed, p):
    """Dropped or not, of mean 0 and variance 1 if independent: [B, H, Nq, Nk]."""
    dropped = ~kept_by(torch.tensor([seed]), SHAPE, p)
    return (dropped.double() - p) / (p * (1 - p)) ** 0.5


def assert_uncorrelated(x, y, errors=4.5):
    product = x * y
    assert abs(product.sum().item()) < errors * product.numel() ** 0.5


class TestStatistics:
    """Sums of independent terms of variance 1, in standard errors."""

    def test_rate(self, p):
        for seed in (0, 1, -1, 2**62 + 12345):
            x = centred(seed, p)
            assert abs(x.sum().item()) < 4 * x.numel() ** 0.5

    def test_neighbours(self, p):
        x = centred(5, p)
        for lag in (1, 2, 3, 4, 8, 16, 32, 64, 127):
            assert_uncorrelated(x[..., lag:], x[..., :-lag])
            assert_uncorrelated(x[:, :, lag:], x[:, :, :-lag])
            assert_uncorrelated(x[:, :, lag:, lag:], x[:, :, :-lag, :-lag])
            assert_uncorrelated(x[:, :, lag:, :-lag], x[:, :, :-lag, lag:])
        assert_uncorrelated(x[..., 2:] * x[..., 1:-1], x[..., :-2])

    def test_heads_and_samples(self, p):
        x = centred(6, p)
        for lag in (1, 2, 3):
            assert_uncorrelated(x[lag:], x[:-lag])
            assert_uncorrelated(x[:, lag:], x[:, :-lag])

    def test_seeds(self, p):
        x = centred(100, p)
        for other in (101, 102, 108, 100 + 2**32, -100, 100 - 2**63):
            assert_uncorrelated(x, centred(other, p))

    def test_counts_spread_as_they_should(self, p):
        """The variance of how many are dropped of a row, of a column, and of windows of a row."""
        x, v = centred(8, p).flatten(0, 2), p * (1 - p)
        windows = [x.unflatten(1, (-1, w)).sum(-1).flatten() / w**0.5 for w in (4, 16, 512)]
        for n, sums in zip(
            (4, 16, 512, x.shape[0]), (*windows, x.sum(0) / len(x) ** 0.5), strict=True
        ):
            spread = (2 + (1 / v - 6) / n) ** 0.5  # of a squared sum of n terms
            error = (sums.square().mean() - 1).item() * sums.numel() ** 0.5 / spread
            assert abs(error) < 5

    def test_pairs_of_rows_and_of_keys(self):
        """No two rows and no two keys share their pattern: the largest of their correlations."""
        x = centred(9, 0.5)[0].flatten(0, 1)
        for y in (x, x.T):
            products = (y @ y.T / y.shape[1] ** 0.5).fill_diagonal_(0)
            assert products.abs().max() < 6
