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

MAX_HEADS = 64


class Static(NamedTuple):
    """What is known when a kernel is compiled."""

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
    """All statistics, dense: they are H x H, the gradients are never copied."""
    dense = (None if x is None else x.contiguous() for x in (cosines, norms, dpenalty, dcosines))
    return Statistics(*dense)


@triton.jit
def on_diagonal(x, S: tl.constexpr):
    """[HEADS, HEADS] where the diagonal is, ``x`` there and zero elsewhere."""
    h = tl.arange(0, S.HEADS)
    return tl.where(h[:, None] == h[None, :], x, 0.0)


@triton.jit
def off_diagonal(x, S: tl.constexpr):
    """(1 − I) ∘ x."""
    h = tl.arange(0, S.HEADS)
    return tl.where(h[:, None] == h[None, :], 0.0, x)


@triton.jit
def diagonal(x, S: tl.constexpr):
    """[HEADS]."""
    return tl.sum(on_diagonal(x, S), 1)


@triton.jit
def over_norms(x, n):
    """x_hk / (n_h n_k), a factor at a time: their product may leave float32's range."""
    return x / n[:, None] / n[None, :]


@triton.jit
def over_free_norm(x, n, eps):
    """f_h x_h of (34), x / n²: zero where the norm is clamped, for there it is a constant."""
    return tl.where(n <= eps, 0.0, x / n / n)


@triton.jit
def matrix_places(group, S: tl.constexpr):
    """Where a group's matrix lies in [groups, H, H], and which of its elements exist."""
    h = tl.arange(0, S.HEADS)
    at = group * (S.H * S.H) + h[:, None] * S.H + h[None, :]
    return at, (h < S.H)[:, None] & (h < S.H)[None, :]


@triton.jit
def load_matrix(ptr, group, S: tl.constexpr):
    at, inside = matrix_places(group, S)
    return tl.load(ptr + at, mask=inside, other=0.0).to(S.ACC)


@triton.jit
def store_matrix(ptr, group, x, S: tl.constexpr):
    """Nothing of None."""
    if ptr is not None:
        at, inside = matrix_places(group, S)
        tl.store(ptr + at, x, mask=inside)


@triton.jit
def load_norms(G, group, S: tl.constexpr):
    """[HEADS]."""
    h = tl.arange(0, S.HEADS)
    return tl.load(G.norms + group * S.H + h, mask=h < S.H, other=1.0)


@triton.jit
def store_statistics(G, penalties_ptr, group, r, weight, eps, S: tl.constexpr):
    """(30)-(32) of a group from its R: cosines, norms, and what it adds to the penalty."""
    h = tl.arange(0, S.HEADS)
    length = tl.sqrt(diagonal(r, S))
    n = tl.where(length < eps, eps, length)
    c = over_norms(r, n)
    store_matrix(G.cosines, group, c, S)
    tl.store(G.norms + group * S.H + h, n, mask=h < S.H)
    tl.store(penalties_ptr + group, weight * tl.sum(tl.sum(off_diagonal(c * c, S), 1), 0))


@triton.jit
def slope(G, group, c, n, weight, eps, S: tl.constexpr):
    """(33)-(34) of a group: Λ, s and M."""
    lam = tl.zeros([S.HEADS, S.HEADS], S.ACC)
    if G.dpenalty is not None:
        lam = off_diagonal(c, S) * (4.0 * weight * tl.load(G.dpenalty).to(S.ACC))
    if G.dcosines is not None:
        dc = load_matrix(G.dcosines, group, S)
        lam = lam + dc + tl.trans(dc)
    s = tl.sum(lam * c, 1)
    m = over_norms(lam, n) - on_diagonal(over_free_norm(s, n, eps)[:, None], S)
    return lam, s, m


@triton.jit
def curvature(G, k, c, n, lam, s, weight, eps, S: tl.constexpr):
    """(36)-(38) of a group, ``k`` = A Gᵀ: Ṁ and Ċ."""
    r_dot = k + tl.trans(k)
    delta = -0.5 * over_free_norm(diagonal(r_dot, S), n, eps)
    deltas = delta[:, None] + delta[None, :]
    c_dot = over_norms(r_dot, n) + c * deltas
    m_dot = lam * deltas
    s_dot = tl.sum(lam * c_dot, 1) + 2.0 * delta * s
    if G.dpenalty is not None:
        lam_dot = off_diagonal(c_dot, S) * (4.0 * weight * tl.load(G.dpenalty).to(S.ACC))
        m_dot += lam_dot
        s_dot += tl.sum(lam_dot * c, 1)
    m_dot = over_norms(m_dot, n) - on_diagonal(over_free_norm(s_dot, n, eps)[:, None], S)
    return m_dot, c_dot


@triton.jit
def store_cotangents(gdpenalties_ptr, gdcosines_ptr, group, c, c_dot, weight, S: tl.constexpr):
    """(37) of a group: gdC, and what it adds to gdp; nothing of None."""
    store_matrix(gdcosines_ptr, group, c_dot, S)
    if gdpenalties_ptr is not None:
        total = tl.sum(tl.sum(off_diagonal(c * c_dot, S), 1), 0)
        tl.store(gdpenalties_ptr + group, 2.0 * weight * total)
