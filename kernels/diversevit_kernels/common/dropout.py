"""Which attention weights dropout keeps: (55)-(57) of kernels/README.md, in PyTorch's integers.

The definition, that every backend repeats bit for bit: a function of the seed, the row and the key alone, so that all
orders keep the same weights, on any device, in tiles of any size and on any number of threads.

Dtypes   words of 32 bits are held in int64, and no product of them reaches 2^63: a compiler of C++ may take it that
         signed numbers do not wrap around, and Inductor's did.
"""

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of Philox4x32
WEYL = (0x9E3779B9, 0xBB67AE85)  # what its two keys grow by in each round
KEY_STEP, MIX = 0x9E3779B9, (0x21F0AAAD, 0x735A2D97)
_LOW = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """A weight is kept if its 32 random bits are at least this: one of 2^32 equal probabilities."""
    return math.floor(dropout_p * 2.0**32)


def row_words(seed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(55)  Two words for each row, of Philox4x32-10; ``seed`` int64 [1], ``rows`` int64, (b H + h) N_q + i."""
    zero = torch.zeros_like(rows)
    counter = (rows & _LOW, (rows >> 32) & _LOW, zero, zero)
    a, c, _, _ = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    return a, c


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of words of 32 bits, held in int64 (Salmon et al. 2011, Random123)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def kept(words: tuple[Tensor, Tensor], keys: Tensor, dropout_p: float) -> Tensor:
    """(56)-(57)  Which weights are kept; ``words`` of the rows and ``keys``, of any integer dtype, broadcast."""
    a, c = words
    x = (keys.to(torch.int64) * KEY_STEP + a) & _LOW
    x = (x ^ x >> 16) * MIX[0] & _LOW
    x = ((x ^ x >> 15) + c & _LOW) * MIX[1] & _LOW
    return (x ^ x >> 15) >= threshold(dropout_p)


def kept_by(seed: Tensor, shape: tuple[int, ...], dropout_p: float) -> Tensor:
    """Which of all weights [B, H, Nq, Nk] are kept."""
    B, H, Nq, Nk = shape
    rows = torch.arange(B * H * Nq, device=seed.device).view(B, H, Nq, 1)
    keys = torch.arange(Nk, device=seed.device)
    return kept(row_words(seed, rows), keys, dropout_p)


def _product(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of words, from those of the halves of x."""
    low, high = (x & 0xFFFF) * by, (x >> 16) * by
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _LOW
