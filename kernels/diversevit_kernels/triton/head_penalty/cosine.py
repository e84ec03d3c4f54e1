"""Cosines between heads on a GPU, (30)-(39) of kernels/README.md: everything that is H x H, on chip.

A group's matrices (see ``grouping.py``) are tiles [HEADS, HEADS] of one program, H padded to a power of two of at
least 16, which matrix products need. Padded heads are zero rows and columns, their norms are 1.

Shapes   cosines, dcosines [groups, H, H], norms [groups, H]: dense, and [B, N, ...] by token, [B, ...] by sample.
Dtypes   ``ACC``: float32 (float64 for float64).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...common.grouping import Statistics
from ..runtime.copies import dense

MAX_HEADS = 64


class Constants(NamedTuple):
    """Constants of a kernel: known when it is compiled."""

    H: int
    HEADS: int  # H padded
    E: int  # channels of a token's gradient
    BY_TOKEN: bool
    ACC: tl.dtype  # of accumulators and statistics
    INDEX: tl.dtype  # of positions inside a group: int64 where an offset needs it
    PRECISION: str  # of products of gradients
    MIXING: str  # of products of H x H matrices with gradients: those of ACC


def given(
    cosines: Tensor, norms: Tensor, dpenalty: Tensor | None, dcosines: Tensor | None
) -> Statistics:
    """Statistics and cotangents, made dense: they are H x H, the gradients are never copied."""
    return Statistics(*map(dense, (cosines, norms, dpenalty, dcosines)))


@triton.jit
def on_diagonal(x, const: tl.constexpr):
    """The diagonal of [HEADS, HEADS] (or numbers to put there), zero elsewhere."""
    h = tl.arange(0, const.HEADS)
    return tl.where(h[:, None] == h[None, :], x, 0.0)


@triton.jit
def off_diagonal(x, const: tl.constexpr):
    """``x`` with a diagonal of zeros, (1 − I) ∘ x."""
    h = tl.arange(0, const.HEADS)
    return tl.where(h[:, None] == h[None, :], 0.0, x)


@triton.jit
def diagonal(x, const: tl.constexpr):
    """The diagonal of [HEADS, HEADS], as [HEADS]."""
    return tl.sum(on_diagonal(x, const), 1)


@triton.jit
def over_norms(x, n):
    """Divide by the norms, x_hk / (n_h n_k), one at a time: their product may leave float32's range."""
    return x / n[:, None] / n[None, :]


@triton.jit
def over_free_norm(x, n, eps):
    """Divide by the square of a norm, f_h x_h of (34): zero where the norm is clamped, for there it is a constant."""
    return tl.where(n <= eps, 0.0, x / n / n)


@triton.jit
def matrix_places(group, const: tl.constexpr):
    """Offsets of a group's matrix in [groups, H, H], and which of its elements exist."""
    h = tl.arange(0, const.HEADS)
    at = group * (const.H * const.H) + h[:, None] * const.H + h[None, :]
    return at, (h < const.H)[:, None] & (h < const.H)[None, :]


@triton.jit
def load_matrix(ptr, group, const: tl.constexpr):
    """Load a group's matrix, [HEADS, HEADS], zero outside."""
    at, inside = matrix_places(group, const)
    return tl.load(ptr + at, mask=inside, other=0.0).to(const.ACC)


@triton.jit
def store_matrix(ptr, group, x, const: tl.constexpr):
    """Store a group's matrix [HEADS, HEADS]; nothing of None."""
    if ptr is not None:
        at, inside = matrix_places(group, const)
        tl.store(ptr + at, x, mask=inside)


@triton.jit
def load_norms(stats, group, const: tl.constexpr):
    """Load a group's norms, [HEADS]."""
    h = tl.arange(0, const.HEADS)
    return tl.load(stats.norms + group * const.H + h, mask=h < const.H, other=1.0)


@triton.jit
def store_statistics(stats, penalties_ptr, group, gram, weight, eps, const: tl.constexpr):
    """Store cosines, norms, and what a group adds to the penalty, (30)-(32), from its Gram matrix R."""
    h = tl.arange(0, const.HEADS)
    length = tl.sqrt(diagonal(gram, const))
    n = tl.where(length < eps, eps, length)
    c = over_norms(gram, n)
    store_matrix(stats.cosines, group, c, const)
    tl.store(stats.norms + group * const.H + h, n, mask=h < const.H)
    tl.store(penalties_ptr + group, weight * tl.sum(tl.sum(off_diagonal(c * c, const), 1), 0))


@triton.jit
def slope(stats, group, c, n, weight, eps, const: tl.constexpr):
    """Λ, s and M of a group, (33)-(34): the backward is dG = M G."""
    lam = tl.zeros([const.HEADS, const.HEADS], const.ACC)
    if stats.dpenalty is not None:
        lam = off_diagonal(c, const) * (4.0 * weight * tl.load(stats.dpenalty).to(const.ACC))
    if stats.dcosines is not None:
        dc = load_matrix(stats.dcosines, group, const)
        lam = lam + dc + tl.trans(dc)
    s = tl.sum(lam * c, 1)
    m = over_norms(lam, n) - on_diagonal(over_free_norm(s, n, eps)[:, None], const)
    return lam, s, m


@triton.jit
def curvature(stats, product, c, n, lam, s, weight, eps, const: tl.constexpr):
    """Ṁ and Ċ of a group, (36)-(38), the derivatives of M and C along ddG; ``product`` is ddG Gᵀ."""
    gram_dot = product + tl.trans(product)
    delta = -0.5 * over_free_norm(diagonal(gram_dot, const), n, eps)
    deltas = delta[:, None] + delta[None, :]
    c_dot = over_norms(gram_dot, n) + c * deltas
    m_dot = lam * deltas
    s_dot = tl.sum(lam * c_dot, 1) + 2.0 * delta * s
    if stats.dpenalty is not None:
        lam_dot = off_diagonal(c_dot, const) * (
            4.0 * weight * tl.load(stats.dpenalty).to(const.ACC)
        )
        m_dot += lam_dot
        s_dot += tl.sum(lam_dot * c, 1)
    m_dot = over_norms(m_dot, n) - on_diagonal(over_free_norm(s_dot, n, eps)[:, None], const)
    return m_dot, c_dot


@triton.jit
def store_cotangents(gdpenalties_ptr, gdcosines_ptr, group, c, c_dot, weight, const: tl.constexpr):
    """Store gdC of a group, and what it adds to gdp, (37); nothing of None."""
    store_matrix(gdcosines_ptr, group, c_dot, const)
    if gdpenalties_ptr is not None:
        total = tl.sum(tl.sum(off_diagonal(c * c_dot, const), 1), 0)
        tl.store(gdpenalties_ptr + group, 2.0 * weight * total)
