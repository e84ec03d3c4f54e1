"""Kernels that read heads' gradients G [b, H, n, E]: Gram matrices, and H x H matrices times G.

A program reads tiles [HEADS, BLOCK_K]: all heads of one group, BLOCK_K of its K elements (K = E by token, n E
by sample, numbered token by token). By token one program does a whole token. By sample the K elements of a
group are cut into parts of ``span``: products are summed per part, then over parts in order, so the same
bits come out on every run.

Functions take the gradients of a tile of tokens, so that ``routed_head_penalty`` can hand them over as
it makes them. Equations (30)-(39) of kernels/README.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Statistics
from ..attention.tiles import as_number, operand
from ..runtime.configurations import accumulator, configuration, precision
from ..runtime.launch import allocate, cdiv, check_operand, launch, power_of_two, reach
from ..runtime.tiles import dot
from .cosine import (
    MAX_HEADS,
    Static,
    curvature,
    load_matrix,
    load_norms,
    slope,
    store_cotangents,
    store_matrix,
    store_statistics,
)


@triton.jit
def group_part(parts, span, N, S: tl.constexpr):
    """This program's group, its sample and first token, its part, and where that begins and ends."""
    program = tl.program_id(0).to(tl.int64)
    group, part = program // parts, program % parts
    if S.BY_TOKEN:
        return group, group // N, group % N, part, 0, S.E
    else:
        first = (part * span).to(S.INDEX)
        return group, group, group * 0, part, first, tl.minimum(first + span, N * S.E)


@triton.jit
def _places(x, b, token, k, end, S: tl.constexpr):
    """Addresses of all heads' elements ``k`` of a group, [HEADS, BLOCK_K], and which of them exist."""
    h = tl.arange(0, S.HEADS).to(S.INDEX)
    along = k * x.col if S.BY_TOKEN else k // S.E * x.row + k % S.E * x.col
    ptr = x.ptr + b * x.sample + token * x.row
    inside = (h < S.H)[:, None] & (k < end)[None, :]
    return ptr + (h[:, None] * x.head + along[None, :]), inside


@triton.jit
def load_heads(x, b, token, k, end, S: tl.constexpr):
    at, inside = _places(x, b, token, k, end, S)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_heads(x, b, token, k, end, tile, S: tl.constexpr):
    at, inside = _places(x, b, token, k, end, S)
    tl.store(at, tile.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def gram(x, y, b, token, first, end, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """X Yᵀ over elements [first, end) of a group; G Gᵀ if ``y`` is None."""
    r = tl.zeros([S.HEADS, S.HEADS], S.ACC)
    for start in range(first, end, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(S.INDEX)
        left = load_heads(x, b, token, k, end, S)
        right = left if y is None else load_heads(y, b, token, k, end, S)
        r = dot(left, tl.trans(right), r, S.PRECISION)
    return r


@triton.jit
def mixed(m, x, S: tl.constexpr):
    """M X, in ACC: M is not rounded to the dtype of the gradients, whose range it may leave."""
    acc = tl.zeros([S.HEADS, x.shape[1]], S.ACC)
    return dot(m, x.to(S.ACC), acc, S.MIXING)


@triton.jit
def sum_of_parts(raw_ptr, group, parts, S: tl.constexpr, BLOCK_P: tl.constexpr):
    """[HEADS, HEADS]: a group's matrices of [groups, parts, H, H], summed in order."""
    h = tl.arange(0, S.HEADS)
    inside = (h < S.H)[:, None] & (h < S.H)[None, :]
    at = h[:, None] * S.H + h[None, :]
    total = tl.zeros([BLOCK_P, S.HEADS, S.HEADS], S.ACC)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        where = raw_ptr + (group * parts + part)[:, None, None] * (S.H * S.H) + at[None, :, :]
        mask = (part < parts)[:, None, None] & inside[None, :, :]
        total += tl.load(where, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _products_kernel(
    x,  # Operand [b, H, n, E]
    y,  # Operand like x, or None for x itself
    raw_ptr,  # [b, parts, H, H]
    N,  # n
    span,  # elements of a part
    parts,
    S: tl.constexpr,  # Static
    BLOCK_K: tl.constexpr,
):
    """X Yᵀ of (30) or (36), by sample. One program owns one part of one sample."""
    group, b, token, part, first, end = group_part(parts, span, N, S)
    store_matrix(raw_ptr, group * parts + part, gram(x, y, b, token, first, end, S, BLOCK_K), S)


@triton.jit
def _statistics_kernel(
    x,  # Operand [b, H, n, E] by token, else None
    raw_ptr,  # [b, parts, H, H] parts of R by sample, else None
    G,  # Statistics, written
    penalties_ptr,  # [groups] what each group adds to the penalty
    N,  # n
    parts,
    weight: tl.float64,
    eps: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(30)-(32). One program owns one group: a token's gradients, or the parts of a sample's R."""
    if raw_ptr is None:
        group, b, token, _, first, end = group_part(1, 0, N, S)
        r = gram(x, None, b, token, first, end, S, BLOCK_K)
    else:
        group = tl.program_id(0).to(tl.int64)
        r = sum_of_parts(raw_ptr, group, parts, S, BLOCK_P)
    weight, eps = as_number(weight, S.ACC), as_number(eps, S.ACC)
    store_statistics(G, penalties_ptr, group, r, weight, eps, S)


@triton.jit
def _backward_kernel(
    x,  # Operand [b, H, n, E]
    dx,  # Operand like x, written
    G,  # Statistics
    N,  # n
    span,  # elements of a part
    parts,
    weight: tl.float64,
    eps: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_K: tl.constexpr,
):
    """(33)-(35). One program owns one token, or one part of one sample."""
    group, b, token, _, first, end = group_part(parts, span, N, S)
    c, n = load_matrix(G.cosines, group, S), load_norms(G, group, S)
    weight, eps = as_number(weight, S.ACC), as_number(eps, S.ACC)
    _, _, m = slope(G, group, c, n, weight, eps, S)
    for start in range(first, end, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(S.INDEX)
        tile = load_heads(x, b, token, k, end, S)
        store_heads(dx, b, token, k, end, mixed(m, tile, S), S)


@triton.jit
def _curvature_kernel(
    raw_ptr,  # [b, parts, H, H] parts of A Gᵀ
    G,  # Statistics
    m_dot_ptr,  # [b, H, H], written
    gdpenalties_ptr,  # [b] what each sample adds to gdp, or None
    gdcosines_ptr,  # [b, H, H], or None
    parts,
    weight: tl.float64,
    eps: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_P: tl.constexpr,
):
    """(36)-(38) by sample. One program owns one sample: the parts of its A Gᵀ."""
    group = tl.program_id(0).to(tl.int64)
    c, n = load_matrix(G.cosines, group, S), load_norms(G, group, S)
    weight, eps = as_number(weight, S.ACC), as_number(eps, S.ACC)
    product = sum_of_parts(raw_ptr, group, parts, S, BLOCK_P)
    lam, s, _ = slope(G, group, c, n, weight, eps, S)
    m_dot, c_dot = curvature(G, product, c, n, lam, s, weight, eps, S)
    store_matrix(m_dot_ptr, group, m_dot, S)
    store_cotangents(gdpenalties_ptr, gdcosines_ptr, group, c, c_dot, weight, S)


@triton.jit
def _double_backward_kernel(
    x,  # Operand [b, H, n, E]
    a,  # Operand like x: A
    gx,  # Operand like x, written: (39)
    dx,  # Operand like x, written: (35), or None
    G,  # Statistics
    m_dot_ptr,  # [b, H, H] by sample, else None
    gdpenalties_ptr,  # [groups] by token or None
    gdcosines_ptr,  # [groups, H, H] by token or None
    N,  # n
    span,  # elements of a part
    parts,
    weight: tl.float64,
    eps: tl.float64,
    S: tl.constexpr,  # Static
    BLOCK_K: tl.constexpr,
):
    """(36)-(39). One program owns one token, which it reads twice, or one part of one sample."""
    group, b, token, _, first, end = group_part(parts, span, N, S)
    c, n = load_matrix(G.cosines, group, S), load_norms(G, group, S)
    weight, eps = as_number(weight, S.ACC), as_number(eps, S.ACC)
    lam, s, m = slope(G, group, c, n, weight, eps, S)
    if m_dot_ptr is None:
        product = gram(a, x, b, token, first, end, S, BLOCK_K)
        m_dot, c_dot = curvature(G, product, c, n, lam, s, weight, eps, S)
        store_cotangents(gdpenalties_ptr, gdcosines_ptr, group, c, c_dot, weight, S)
    else:
        m_dot = load_matrix(m_dot_ptr, group, S)
    for start in range(first, end, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(S.INDEX)
        x_tile = load_heads(x, b, token, k, end, S)
        a_tile = load_heads(a, b, token, k, end, S)
        g_tile = mixed(m, a_tile, S) + mixed(m_dot, x_tile, S)
        store_heads(gx, b, token, k, end, g_tile, S)
        if dx is not None and S.HEADS <= 32:
            store_heads(dx, b, token, k, end, mixed(m, x_tile, S), S)
    if dx is not None and S.HEADS > 32:
        # a loop of its own: the registers do not hold all three products
        for start in range(first, end, BLOCK_K):
            k = (start + tl.arange(0, BLOCK_K)).to(S.INDEX)
            dx_tile = mixed(m, load_heads(x, b, token, k, end, S), S)
            store_heads(dx, b, token, k, end, dx_tile, S)


def static_of(g: Grouping, *likes: Tensor) -> Static:
    """What kernels must know of a problem.

    Args:
        likes: gradients [b, H, n, E] as they will be read or written, for dtype, E and reach in memory.

    Raises:
        NotImplementedError: a dtype, layout or number of heads without a kernel.
    """
    for x in likes:
        check_operand("grads", x)
    if g.H > MAX_HEADS:
        raise NotImplementedError(f"Triton penalties take up to {MAX_HEADS} heads, not {g.H}")
    x = likes[0]
    wide = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    farthest = max(reach(x, 1) for x in likes)
    return Static(
        H=g.H,
        HEADS=max(16, power_of_two(g.H)),
        E=x.shape[-1],
        BY_TOKEN=g.by_token,
        ACC=accumulator(x.dtype),
        INDEX=tl.int32 if max(farthest, x.shape[2] * x.shape[3]) < 2**30 else tl.int64,
        PRECISION=precision(x),
        MIXING=precision(wide),
    )


def programs_of(S: Static, x: Tensor) -> tuple[int, int, int]:
    """Groups of ``x``, elements of a part, and parts of a group."""
    b, _, n, E = x.shape
    if S.BY_TOKEN:
        return b * n, E, 1
    span = configuration("head_penalty_span", x, S.HEADS)["SPAN"]
    return b, span, cdiv(n * E, span)


def products(S: Static, x: Tensor, y: Tensor | None, raw: Tensor) -> None:
    """Parts of X Yᵀ by sample, of G Gᵀ if ``y`` is None, into ``raw`` [b, parts, H, H]."""
    groups, span, parts = programs_of(S, x)
    sizes = x.shape[2], span, parts
    grid = groups * parts
    given = operand(x), operand(y), raw, *sizes
    launch("head_penalty_products", _products_kernel, lambda _: grid, x, S.HEADS, *given, S=S)


def statistics(
    g: Grouping, S: Static, x: Tensor | None, raw: Tensor | None, out: Statistics, penalties: Tensor
) -> None:
    """(30)-(32) of the groups of ``x`` by token, of ``raw`` by sample, into ``out`` and ``penalties``."""
    like = penalties if x is None else x
    N, parts = 1 if x is None else x.shape[2], 1 if raw is None else raw.shape[1]
    given = operand(x), raw, out, penalties, N, parts, g.weight, g.eps
    grid = penalties.numel()
    launch(
        "head_penalty_statistics", _statistics_kernel, lambda _: grid, like, S.HEADS, *given, S=S
    )


def backward(g: Grouping, S: Static, x: Tensor, dx: Tensor, here: Statistics) -> None:
    """(35) of a tile of tokens, into ``dx``."""
    groups, *sizes = programs_of(S, x)
    grid = groups * sizes[1]
    given = operand(x), operand(dx), here, x.shape[2], *sizes, g.weight, g.eps
    launch("head_penalty_backward", _backward_kernel, lambda _: grid, x, S.HEADS, *given, S=S)


def curvatures(
    g: Grouping,
    S: Static,
    raw: Tensor,
    here: Statistics,
    gdpenalties: Tensor | None,
    gdcosines: Tensor | None,
) -> Tensor:
    """(37)-(38) of samples: writes ``gdpenalties`` [b] and ``gdcosines``, returns Ṁ [b, H, H]."""
    m_dot = allocate(tuple(here.cosines.shape), here.cosines.dtype, raw)
    given = raw, here, m_dot, gdpenalties, gdcosines, raw.shape[1], g.weight, g.eps
    grid = raw.shape[0]
    launch("head_penalty_curvature", _curvature_kernel, lambda _: grid, raw, S.HEADS, *given, S=S)
    return m_dot


def double_backward(
    g: Grouping,
    S: Static,
    x: Tensor,
    a: Tensor,
    gx: Tensor,
    dx: Tensor | None,
    here: Statistics,
    m_dot: Tensor | None,
    gdpenalties: Tensor | None,
    gdcosines: Tensor | None,
) -> None:
    """(39) of a tile of tokens into ``gx``, and (35) into ``dx`` unless it is None.

    By token also (37) into ``gdpenalties`` and ``gdcosines``; by sample ``m_dot`` is given.
    """
    groups, *sizes = programs_of(S, x)
    grid = groups * sizes[1]
    tensors = operand(x), operand(a), operand(gx), operand(dx), here, m_dot
    results = (gdpenalties, gdcosines) if m_dot is None else (None, None)
    given = *tensors, *results, x.shape[2], *sizes, g.weight, g.eps
    name = "head_penalty_double_backward"
    launch(name, _double_backward_kernel, lambda _: grid, x, S.HEADS, *given, S=S)
