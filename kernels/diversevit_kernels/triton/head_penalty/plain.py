"""Penalty on the cosines between head gradients on a GPU: (30)-(39) of kernels/README.md.

By token one program does all of a token: its Gram matrix, the H x H algebra, and in a backward pass M times
its gradients. By sample a program does a part of one sample's elements; Gram matrices of parts are summed in
order by a second kernel (``head_products.py``). No atomics: same bits on every run.

Shapes   grads, ddgrads [B, H, N, E] of any strides; dgrads, ggrads [B, H, N, E] laid out as [B, N, H, E];
         cosines, norms as in ``cosine.py``; H up to 64.
Dtypes   float16, bfloat16, float32, float64; products take G as it is, those with M are in float32 (float64 for
         float64), like all statistics and sums.
Traffic  forward reads G once; backward reads G once and writes dG; double backward reads G and A once, and once
         more from the cache (by token) or from memory (by sample), and writes gG. Statistics are H x H per group.
"""

from torch import Tensor

from ...common.contracts import HeadPenaltyBackward, HeadPenaltyDoubleBackward
from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Statistics
from ..attention.tiles import empty_heads
from ..runtime.launch import allocate
from . import gram as head_products
from .cosine import given


def head_penalty_forward(
    grads: Tensor, granularity: str, reduction: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(30)-(32): penalty, cosines, norms."""
    g = _grouping(grads, granularity, reduction, eps)
    static = head_products.static_of(g, grads)
    out, penalties = empty_statistics(g, grads)
    if g.by_token:
        head_products.statistics(g, static, grads, None, out, penalties)
    else:
        raw = empty_parts(static, grads)
        head_products.products(static, grads, None, raw)
        head_products.statistics(g, static, None, raw, out, penalties)
    return penalties.sum(), out.cosines, out.norms


def head_penalty_backward(inputs: HeadPenaltyBackward) -> Tensor:
    """(33)-(35): ``dgrads``."""
    grads, cosines, norms, dpenalty, dcosines, granularity, reduction, eps = inputs
    g = _grouping(grads, granularity, reduction, eps)
    dgrads = empty_heads(grads)
    static = head_products.static_of(g, grads, dgrads)
    here = given(cosines, norms, dpenalty, dcosines)
    head_products.backward(g, static, grads, dgrads, here)
    return dgrads


def head_penalty_double_backward(
    inputs: HeadPenaltyDoubleBackward,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(36)-(39): ``ggrads``, and ``gdpenalty``, ``gdcosines`` where there is such a cotangent."""
    grads, cosines, norms, dpenalty, dcosines, ddgrads, granularity, reduction, eps = inputs
    g = _grouping(grads, granularity, reduction, eps)
    ggrads = empty_heads(grads)
    static = head_products.static_of(g, grads, ddgrads, ggrads)
    here = given(cosines, norms, dpenalty, dcosines)
    gdpenalties, gdcosines = empty_cotangents(here)
    m_dot = None
    if not g.by_token:
        raw = empty_parts(static, grads)
        head_products.products(static, ddgrads, grads, raw)
        m_dot = head_products.curvatures(g, static, raw, here, gdpenalties, gdcosines)
    operands = grads, ddgrads, ggrads, None, here, m_dot, gdpenalties, gdcosines
    head_products.double_backward(g, static, *operands)
    return ggrads, None if gdpenalties is None else gdpenalties.sum(), gdcosines


def empty_statistics(g: Grouping, like: Tensor) -> tuple[Statistics, Tensor]:
    """Uninitialised cosines and norms, and what each group adds to the penalty."""
    dtype = accumulation_dtype(like.dtype)
    cosines = allocate((*g.shape, g.H, g.H), dtype, like)
    return Statistics(cosines, allocate((*g.shape, g.H), dtype, like)), allocate(
        g.shape, dtype, like
    )


def empty_cotangents(here: Statistics) -> tuple[Tensor | None, Tensor | None]:
    """Uninitialised: what each group adds to gdp, and gdC; None where there is no such cotangent."""
    like, groups = here.norms, tuple(here.norms.shape[:-1])
    gdpenalties = None if here.dpenalty is None else allocate(groups, like.dtype, like)
    shape = tuple(here.cosines.shape)
    return gdpenalties, None if here.dcosines is None else allocate(shape, like.dtype, like)


def empty_parts(static: head_products.Static, *tiles: Tensor) -> Tensor:
    """Uninitialised ``[b, parts, H, H]``, the parts of the samples of gradients that come in tiles."""
    parts = sum(head_products.programs_of(static, x)[2] for x in tiles)
    H, x = static.H, tiles[0]
    return allocate((x.shape[0], parts, H, H), accumulation_dtype(x.dtype), x)


def _grouping(grads: Tensor, granularity: str, reduction: str, eps: float) -> Grouping:
    B, H, N, _ = grads.shape
    return Grouping(B, H, N, granularity, reduction, eps)
