"""The H x H algebra of both penalties, in PyTorch: cosines between heads and their derivatives, (30)-(39).

Equations are those of kernels/README.md. A tile's heads are ``[groups, H, K]``, K = E by token and tokens * E by
sample: one set of formulas serves both granularities and both penalties, which differ only in the origin of the heads.

Shapes   cosines [B, N, H, H] and norms [B, N, H] by token; [B, H, H] and [B, H] by sample.
Dtypes   float32 (float64 for float64).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.grouping import Grouping, Statistics, Tile

TILE_ELEMENTS = 1 << 19
"""Elements of a tile's heads, or of their routed gradients (2 MiB in float32).

Near the fastest of 2^18 ... 2^22, whether D is 64 or 768."""


class Slope(NamedTuple):
    """First-order quantities of a tile's groups."""

    lam: Tensor  # [groups, H, H] (33) cotangent of the cosines, symmetric
    s: Tensor  # [groups, H] (34)
    m: Tensor  # [groups, H, H] (34) dG = M G


class Curvature(NamedTuple):
    """Second-order quantities of a tile's groups: derivatives along ddG."""

    m: Tensor  # [groups, H, H] (34)
    m_dot: Tensor  # [groups, H, H] (38) gG = M ddG + M_dot G
    c_dot: Tensor  # [groups, H, H] (37)


def _tokens(g: Grouping, width: int) -> int:
    """Return how many tokens a tile holds, for heads of ``width`` channels."""
    return max(1, TILE_ELEMENTS // (g.H * width))


def penalty_forward(
    g: Grouping, like: Tensor, width: int, heads: Callable[[Tile], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(30)-(32): penalty, cosines, norms, in the dtype of ``like``; ``heads(tile)`` returns [groups, H, K]."""
    penalty = like.new_zeros(())
    cosines, norms = like.new_empty(*g.shape, g.H, g.H), like.new_empty(*g.shape, g.H)
    for block in g.blocks(_tokens(g, width)):
        c, n = g.of(cosines, block[0]), g.of(norms, block[0])
        for i, t in enumerate(block):
            x = heads(t)
            torch.baddbmm(c, x, x.mT, beta=int(i > 0), out=c)
        penalty += _energy(g, c, n)
    return penalty.mul_(g.weight), cosines, norms


def penalty_of(g: Grouping, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(30)-(32): penalty, cosines, norms from the Gram matrices of all groups, which become the cosines in place."""
    norms = gram.new_empty(gram.shape[:-1])
    energy = _energy(g, gram.flatten(0, -3), norms.flatten(0, -2))
    return energy.mul_(g.weight), gram, norms


def _energy(g: Grouping, c: Tensor, n: Tensor) -> Tensor:
    """(30)-(32): turn Gram matrices ``c`` into cosines, write norms ``n``; return the sum of c^2 off the diagonals."""
    n.copy_(c.diagonal(dim1=1, dim2=2)).sqrt_().clamp_(min=g.eps)
    _over_norms(c, n)
    return _off_diagonal(c.square()).sum()


def slopes(g: Grouping, given: Statistics, width: int) -> Iterator[tuple[Tile, Tensor]]:
    """Yield every tile with the ``M`` of its groups, (34)."""
    for block in g.blocks(_tokens(g, width)):
        m = _slope(g, given.of(g, block[0])).m
        yield from ((t, m) for t in block)


def slope_of(g: Grouping, given: Statistics) -> Tensor:
    """Return the ``M`` of all groups, [groups, H, H], (34)."""
    everything = Tile(slice(0, g.B), slice(0, g.N))
    return _slope(g, given.of(g, everything)).m


def cotangent_gradients(given: Statistics) -> tuple[Tensor | None, Tensor | None]:
    """Allocate ``gdpenalty`` (zero) and ``gdcosines``, each if its cotangent exists; ``curvatures`` computes them."""
    cosines, _, dpenalty, dcosines = given
    gdpenalty = None if dpenalty is None else cosines.new_zeros(())
    return gdpenalty, None if dcosines is None else cosines.new_empty(cosines.shape)


def curvatures(
    g: Grouping,
    given: Statistics,
    width: int,
    operands: Callable[[Tile], tuple[Tensor, Tensor]],
    gdpenalty: Tensor | None,
    gdcosines: Tensor | None,
) -> Iterator[tuple[Tile, Tensor, Tensor, Curvature]]:
    """Yield every tile with its G, its ddG and the second-order quantities of its groups, (36)-(38).

    ``operands(tile)`` returns G and ddG; it is called twice for a tile if a group spans several. Adds to ``gdpenalty``
    and writes ``gdcosines`` (37) on the way.
    """
    for *others, last in g.blocks(_tokens(g, width)):
        here = given.of(g, last)
        k = torch.zeros_like(here.cosines)
        for t in others:
            x, ddx = operands(t)
            k.baddbmm_(ddx, x.mT)
        x, ddx = operands(last)
        second = _curvature(g, here, k.baddbmm_(ddx, x.mT))
        if gdpenalty is not None:
            total = _off_diagonal(here.cosines * second.c_dot).sum()
            gdpenalty.add_(total, alpha=2 * g.weight)
        if gdcosines is not None:
            g.of(gdcosines, last).copy_(second.c_dot)
        yield last, x, ddx, second
        for t in others:
            yield t, *operands(t), second


def _slope(g: Grouping, here: Statistics) -> Slope:
    """(33)-(34)."""
    c, n, dp, dc = here
    lam = torch.zeros_like(c) if dp is None else _off_diagonal(c * (4 * g.weight * dp))
    if dc is not None:
        lam.add_(dc).add_(dc.mT)
    s = (lam * c).sum(-1)
    m = _over_norms(lam.clone(), n)
    m.diagonal(dim1=1, dim2=2).sub_(_over_free_norm(s, n, g.eps))
    return Slope(lam, s, m)


def _curvature(g: Grouping, here: Statistics, k: Tensor) -> Curvature:
    """(36)-(38) for ``k`` = ddG G^T [groups, H, H]."""
    c, n, dp, _ = here
    lam, s, m = _slope(g, here)
    r_dot = k + k.mT
    delta = _over_free_norm(r_dot.diagonal(dim1=1, dim2=2), n, g.eps).mul_(-0.5)
    deltas = delta[:, :, None] + delta[:, None, :]
    c_dot = _over_norms(r_dot, n).addcmul_(c, deltas)

    m_dot = lam * deltas
    s_dot = (lam * c_dot).sum(-1)
    if dp is not None:
        lam_dot = _off_diagonal(c_dot * (4 * g.weight * dp))
        m_dot += lam_dot
        s_dot += (lam_dot * c).sum(-1)
    _over_norms(m_dot, n)
    s_dot.addcmul_(delta, s, value=2)
    m_dot.diagonal(dim1=1, dim2=2).sub_(_over_free_norm(s_dot, n, g.eps))
    return Curvature(m, m_dot, c_dot)


def _over_norms(x: Tensor, n: Tensor) -> Tensor:
    """``x_hk / (n_h n_k)`` in place, one norm at a time, since their product may leave the range of float32."""
    return x.div_(n[:, :, None]).div_(n[:, None, :])


def _over_free_norm(x: Tensor, n: Tensor, eps: float) -> Tensor:
    """``f_h x_h`` of (34), that is x / n^2, but zero where the norm is clamped and so constant."""
    return x.div(n).div_(n).masked_fill_(n <= eps, 0.0)


def _off_diagonal(x: Tensor) -> Tensor:
    """Set the diagonals of ``x`` to zero, in place."""
    x.diagonal(dim1=1, dim2=2).zero_()
    return x
