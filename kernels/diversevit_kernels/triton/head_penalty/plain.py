"""Penalty on the cosines between head gradients on a GPU: (30)-(39) of kernels/README.md.

By token one program does all of a token, or of several that have few heads: its Gram matrix, the H x H algebra, and in
a backward pass M times its gradients. By sample a program does a part of one sample's elements; Gram matrices of parts
are summed in order by a second kernel (``gram.py``). No atomics: same bits on every run.

Shapes   grads, ddgrads [B, H, N, E] of any strides; dgrads, ggrads [B, H, N, E] laid out as [B, N, H, E];
         cosines, norms as in ``cosine.py``; H up to 64.
Dtypes   float16, bfloat16, float32, float64; products take G as it is, those with M are in float32 (float64 for
         float64), like all statistics and sums.
Traffic  forward reads G once; backward reads G once and writes dG; double backward reads G and ddG once, and once
         more from the cache (by token) or from memory (by sample), and writes gG. Statistics are H x H per group.
"""

from torch import Tensor

from ...common.contracts import HeadPenaltyBackward, HeadPenaltyDoubleBackward
from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Statistics
from ..runtime.sums import total_of
from ..runtime.tensors import allocate, empty_heads
from . import gram
from .cosine import given


def head_penalty_forward(
    grads: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty, (30)-(32): penalty, cosines, norms."""
    g = _grouping(grads, granularity, reduction, eps)
    const = gram.constants_of(g, grads)
    out, penalties = empty_statistics(g, grads)
    if g.by_token:
        gram.statistics(g, const, grads, None, out, penalties)
    else:
        raw = empty_parts(const, grads)
        gram.products(const, grads, None, raw)
        gram.statistics(g, const, None, raw, out, penalties)
    return total_of(penalties), out.cosines, out.norms


def head_penalty_backward(inputs: HeadPenaltyBackward) -> Tensor:
    """The gradient of ``grads``, (33)-(35): ``dgrads``."""
    grads, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    g = _grouping(grads, granularity, reduction, eps)
    dgrads = empty_heads(grads)
    const = gram.constants_of(g, grads, dgrads)
    stats = given(cosines, norms, dpenalty, dcosines)
    gram.backward(g, const, grads, dgrads, stats)
    return dgrads


def head_penalty_double_backward(
    inputs: HeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the backward's inputs, (36)-(39): ``ggrads``, ``gdpenalty``, ``gdcosines``.

    The latter two are None where there is no such cotangent.
    """
    grads, cosines, norms, dpenalty, dcosines, ddgrads, granularity, reduction, eps = inputs
    g = _grouping(grads, granularity, reduction, eps)
    ggrads = empty_heads(grads)
    const = gram.constants_of(g, grads, ddgrads, ggrads)
    stats = given(cosines, norms, dpenalty, dcosines)
    gdpenalties, gdcosines = empty_cotangents(stats)
    m_dot = None
    if not g.by_token:
        raw = empty_parts(const, grads)
        gram.products(const, ddgrads, grads, raw)
        m_dot = gram.curvatures(g, const, raw, stats, gdpenalties, gdcosines)
    operands = grads, ddgrads, ggrads, None, stats, m_dot, gdpenalties, gdcosines
    gram.double_backward(g, const, *operands)
    return ggrads, None if gdpenalties is None else total_of(gdpenalties), gdcosines


def empty_statistics(g: Grouping, like: Tensor) -> tuple[Statistics, Tensor]:
    """Uninitialised cosines and norms, and what each group adds to the penalty."""
    dtype = accumulation_dtype(like.dtype)
    cosines = allocate((*g.shape, g.H, g.H), dtype, like)
    return Statistics(cosines, allocate((*g.shape, g.H), dtype, like)), allocate(
        g.shape, dtype, like
    )


def empty_cotangents(stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
    """Uninitialised: what each group adds to gdp, and gdC; None where there is no such cotangent."""
    like, groups = stats.norms, tuple(stats.norms.shape[:-1])
    gdpenalties = None if stats.dpenalty is None else allocate(groups, like.dtype, like)
    shape = tuple(stats.cosines.shape)
    return gdpenalties, None if stats.dcosines is None else allocate(shape, like.dtype, like)


def empty_parts(const: gram.Constants, *tiles: Tensor) -> Tensor:
    """Uninitialised ``[b, parts, H, H]``, the parts of the samples of gradients that come in tiles."""
    parts = sum(gram.programs_of(const, x)[2] for x in tiles)
    H, x = const.H, tiles[0]
    return allocate((x.shape[0], parts, H, H), accumulation_dtype(x.dtype), x)


def _grouping(grads: Tensor, granularity: str, reduction: str, eps: float) -> Grouping:
    B, H, N, _ = grads.shape
    return Grouping(B, H, N, granularity, reduction, eps)
