"""Cosines between heads on a GPU, (30)-(39) of kernels/README.md: everything that is H x H, on chip.

A group's matrices (see ``grouping.py``) are tiles [HEADS, HEADS] of one program: H padded to a power of two, and to at
least 16, which matrix products need. Padded heads are zero rows and columns, their norms are 1. Of tokens with up to 8
heads, several share a tile: their matrices are blocks on its diagonal, of PADDED rows each, and zeros elsewhere.

Shapes   cosines, dcosines [groups, H, H], norms [groups, H]: dense, and [B, N, ...] by token, [B, ...] by sample.
Dtypes   ``ACC``: float32 (float64 for float64).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...common.grouping import Statistics
from ..runtime.copies import dense

MAX_HEADS = 64


class Constants(NamedTuple):
    """Constants of a kernel: known when it is compiled."""

    H: int
    HEADS: int  # rows of a tile: those of all its groups
    PADDED: int  # H padded: rows of a group
    E: int  # channels of a token's gradient
    BY_TOKEN: bool
    ACC: tl.dtype  # of accumulators and statistics
    INDEX: tl.dtype  # of positions inside a group: int64 where an offset needs it
    PRECISION: str  # of products of gradients
    MIXING: str  # of products of H x H matrices with gradients: those of ACC


class Rows(NamedTuple):
    """In a kernel: what the rows of a tile belong to, [HEADS] each."""

    group: Any
    head: Any
    inside: Any  # whether the group and the head exist


def given(
    cosines: Tensor, norms: Tensor, dpenalty: Tensor | None, dcosines: Tensor | None
) -> Statistics:
    """Statistics and cotangents, made dense: they are H x H, the gradients are never copied."""
    return Statistics(*map(dense, (cosines, norms, dpenalty, dcosines)))


@triton.jit
def rows_of(first, groups, const: tl.constexpr):
    """The rows of a tile whose first group is ``first``, of ``groups``."""
    row = tl.arange(0, const.HEADS)
    if const.HEADS == const.PADDED:
        return Rows(first + 0 * row, row, row < const.H)  # the tile has a group
    else:
        group, head = first + row // const.PADDED, row % const.PADDED
        return Rows(group, head, (head < const.H) & (group < groups))


@triton.jit
def in_blocks(x, const: tl.constexpr):
    """``x`` [HEADS, HEADS] with zeros between different groups."""
    if const.HEADS == const.PADDED:
        return x
    else:
        block = tl.arange(0, const.HEADS) // const.PADDED
        return tl.where(block[:, None] == block[None, :], x, 0.0)


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
def matrix_places(rows, const: tl.constexpr):
    """Offsets of the rows' matrices in [groups, H, H], and which of their elements exist."""
    at = rows.group[:, None] * (const.H * const.H) + rows.head[:, None] * const.H
    inside = rows.inside[:, None] & rows.inside[None, :]
    if const.HEADS != const.PADDED:
        inside = inside & (rows.group[:, None] == rows.group[None, :])
    return at + rows.head[None, :], inside


@triton.jit
def load_matrix(ptr, rows, const: tl.constexpr):
    """Load the rows' matrices, [HEADS, HEADS], zero outside."""
    at, inside = matrix_places(rows, const)
    return tl.load(ptr + at, mask=inside, other=0.0).to(const.ACC)


@triton.jit
def store_matrix(ptr, rows, x, const: tl.constexpr):
    """Store the rows' matrices [HEADS, HEADS]; nothing of None."""
    if ptr is not None:
        at, inside = matrix_places(rows, const)
        tl.store(ptr + at, x, mask=inside)


@triton.jit
def load_norms(stats, rows, const: tl.constexpr):
    """Load the rows' norms, [HEADS]."""
    return tl.load(stats.norms + rows.group * const.H + rows.head, mask=rows.inside, other=1.0)


@triton.jit
def store_totals(ptr, rows, x, const: tl.constexpr):
    """Store the sum of each group's matrix [HEADS, HEADS] in [groups]."""
    BLOCKS: tl.constexpr = const.HEADS // const.PADDED
    totals = tl.sum(tl.reshape(tl.sum(x, 1), [BLOCKS, const.PADDED]), 1)
    group = tl.min(rows.group, 0) + tl.arange(0, BLOCKS)
    exists = tl.max(tl.reshape(rows.inside.to(tl.int32), [BLOCKS, const.PADDED]), 1) > 0
    tl.store(ptr + group, totals, mask=exists)


@triton.jit
def store_statistics(stats, penalties_ptr, rows, gram, weight, eps, const: tl.constexpr):
    """Store cosines, norms, and what a group adds to the penalty, (30)-(32), from its Gram matrix R."""
    length = tl.sqrt(diagonal(gram, const))
    n = tl.where(length < eps, eps, length)
    c = over_norms(gram, n)
    store_matrix(stats.cosines, rows, c, const)
    tl.store(stats.norms + rows.group * const.H + rows.head, n, mask=rows.inside)
    store_totals(penalties_ptr, rows, weight * off_diagonal(c * c, const), const)


@triton.jit
def slope(stats, rows, c, n, weight, eps, const: tl.constexpr):
    """Λ, s and M of a group, (33)-(34): the backward is dG = M G."""
    lam = tl.zeros([const.HEADS, const.HEADS], const.ACC)
    if stats.dpenalty is not None:
        lam = off_diagonal(c, const) * (4.0 * weight * tl.load(stats.dpenalty).to(const.ACC))
    if stats.dcosines is not None:
        dc = load_matrix(stats.dcosines, rows, const)
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
def store_cotangents(gdpenalties_ptr, gdcosines_ptr, rows, c, c_dot, weight, const: tl.constexpr):
    """Store gdC of a group, and what it adds to gdp, (37); nothing of None."""
    store_matrix(gdcosines_ptr, rows, c_dot, const)
    if gdpenalties_ptr is not None:
        store_totals(gdpenalties_ptr, rows, 2.0 * weight * off_diagonal(c * c_dot, const), const)
