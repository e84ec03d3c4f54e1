"""Kernels that read heads' gradients G [b, H, n, E]: Gram matrices, and H x H matrices times G.

A program reads tiles [HEADS, BLOCK_K]: all heads of one group, BLOCK_K of its K elements (K = E by token, n E
by sample, numbered token by token). By token one program does a whole token, or as many as fit a tile
(``cosine.py``). By sample the K elements of a group are cut into parts of ``span``: products are summed per part, then
over parts in order, so the same bits come out on every run.

Functions take the gradients of a tile of tokens, so that ``routed.py`` can hand them over as it makes them.
Equations (30)-(39) of kernels/README.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ...common.grouping import Grouping, Statistics
from ..runtime.device import accumulator, precision
from ..runtime.launch import run_kernel
from ..runtime.plan import target_of
from ..runtime.sizes import cdiv, power_of_two
from ..runtime.tensors import allocate, check_operand, operand, reach
from ..runtime.tiles import as_number, dot
from . import configs
from .cosine import (
    MAX_HEADS,
    Constants,
    Rows,
    curvature,
    in_blocks,
    load_matrix,
    load_norms,
    rows_of,
    slope,
    store_cotangents,
    store_matrix,
    store_statistics,
)


@triton.jit
def group_part(groups, parts, span, N, const: tl.constexpr):
    """This program's rows, their samples and tokens, its part, and where that begins and ends.

    Samples and tokens are vectors only where the tile has several groups.
    """
    program = tl.program_id(0).to(tl.int64)
    if const.BY_TOKEN:
        rows = rows_of(program * (const.HEADS // const.PADDED), groups, const)
        group = program if const.HEADS == const.PADDED else rows.group
        return rows, group // N, group % N, program * 0, 0, const.E
    else:
        group, part = program // parts, program % parts
        rows, first = rows_of(group, groups, const), (part * span).to(const.INDEX)
        return rows, group, group * 0, part, first, tl.minimum(first + span, N * const.E)


@triton.jit
def _places(x, rows, b, token, elements, end, const: tl.constexpr):
    """Addresses of ``elements`` of the rows, [HEADS, BLOCK_K], and which of them exist."""
    by_sample = elements // const.E * x.row + elements % const.E * x.col
    along = elements * x.col if const.BY_TOKEN else by_sample
    ptr = x.ptr + b * x.sample + token * x.row
    ptr = ptr if const.HEADS == const.PADDED else ptr[:, None]
    at = ptr + ((rows.head.to(const.INDEX) * x.head)[:, None] + along[None, :])
    return at, rows.inside[:, None] & (elements < end)[None, :]


@triton.jit
def load_heads(x, rows, b, token, elements, end, const: tl.constexpr):
    """Load ``elements`` of the rows, [HEADS, BLOCK_K], zero outside."""
    at, inside = _places(x, rows, b, token, elements, end, const)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_heads(x, rows, b, token, elements, end, tile, const: tl.constexpr):
    """The inverse of ``load_heads``, rounded to the dtype of ``x``."""
    at, inside = _places(x, rows, b, token, elements, end, const)
    tl.store(at, tile.to(x.ptr.dtype.element_ty), mask=inside)


@triton.jit
def gram(x, y, rows, b, token, first, end, const: tl.constexpr, BLOCK_K: tl.constexpr):
    """The products of heads over elements [first, end) of a group, X Yᵀ; X Xᵀ if ``y`` is None."""
    total = tl.zeros([const.HEADS, const.HEADS], const.ACC)
    for start in range(first, end, BLOCK_K):
        elements = (start + tl.arange(0, BLOCK_K)).to(const.INDEX)
        left = load_heads(x, rows, b, token, elements, end, const)
        right = left if y is None else load_heads(y, rows, b, token, elements, end, const)
        total = dot(left, tl.trans(right), total, const.PRECISION)
    return in_blocks(total, const)


@triton.jit
def mixed(m, x, const: tl.constexpr):
    """An H x H matrix times gradients, M X, in ACC: rounded to the gradients' dtype, M may leave its range."""
    acc = tl.zeros([const.HEADS, x.shape[1]], const.ACC)
    return dot(m, x.to(const.ACC), acc, const.MIXING)


@triton.jit
def sum_of_parts(raw_ptr, group, parts, const: tl.constexpr, BLOCK_P: tl.constexpr):
    """The sum over parts of a group's matrices in [groups, parts, H, H], in order: [HEADS, HEADS]."""
    h = tl.arange(0, const.HEADS)
    inside = (h < const.H)[:, None] & (h < const.H)[None, :]
    at = h[:, None] * const.H + h[None, :]
    total = tl.zeros([BLOCK_P, const.HEADS, const.HEADS], const.ACC)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        where = (
            raw_ptr + (group * parts + part)[:, None, None] * (const.H * const.H) + at[None, :, :]
        )
        mask = (part < parts)[:, None, None] & inside[None, :, :]
        total += tl.load(where, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def head_penalty_products_kernel(
    x,  # Operand [b, H, n, E]
    y,  # Operand like x, or None for x itself
    raw_ptr,  # [b, parts, H, H]
    groups,
    N,  # n
    span,  # elements of a part
    parts,
    const: tl.constexpr,  # Constants
    BLOCK_K: tl.constexpr,
):
    """Products of heads, X Yᵀ of (30) or (36), by sample. One program owns one part of one sample."""
    rows, b, token, part, first, end = group_part(groups, parts, span, N, const)
    products = gram(x, y, rows, b, token, first, end, const, BLOCK_K)
    at = Rows(rows.group * parts + part, rows.head, rows.inside)
    store_matrix(raw_ptr, at, products, const)


@triton.jit
def head_penalty_statistics_kernel(
    x,  # Operand [b, H, n, E] by token, else None
    raw_ptr,  # [b, parts, H, H] parts of R by sample, else None
    stats,  # Statistics, written
    penalties_ptr,  # [groups] what each group adds to the penalty
    groups,
    N,  # n
    parts,
    weight: tl.float64,
    eps: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Forward, (30)-(32). One program owns the tokens of a tile, or the parts of one sample's R."""
    if raw_ptr is None:
        rows, b, token, _, _, _ = group_part(groups, 1, 0, N, const)
        products = gram(x, None, rows, b, token, 0, const.E, const, BLOCK_K)
    else:
        group = tl.program_id(0).to(tl.int64)
        rows = rows_of(group, groups, const)
        products = sum_of_parts(raw_ptr, group, parts, const, BLOCK_P)
    weight, eps = as_number(weight, const.ACC), as_number(eps, const.ACC)
    store_statistics(stats, penalties_ptr, rows, products, weight, eps, const)


@triton.jit
def head_penalty_backward_kernel(
    grads,  # Operand [b, H, n, E]
    dgrads,  # Operand like grads, written
    stats,  # Statistics
    groups,
    N,  # n
    span,  # elements of a part
    parts,
    weight: tl.float64,
    eps: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_K: tl.constexpr,
):
    """Backward, (33)-(35). One program owns the tokens of a tile, or one part of one sample."""
    rows, b, token, _, first, end = group_part(groups, parts, span, N, const)
    c, n = load_matrix(stats.cosines, rows, const), load_norms(stats, rows, const)
    weight, eps = as_number(weight, const.ACC), as_number(eps, const.ACC)
    _, _, m = slope(stats, rows, c, n, weight, eps, const)
    for start in range(first, end, BLOCK_K):
        elements = (start + tl.arange(0, BLOCK_K)).to(const.INDEX)
        tile = load_heads(grads, rows, b, token, elements, end, const)
        store_heads(dgrads, rows, b, token, elements, end, mixed(m, tile, const), const)


@triton.jit
def head_penalty_curvature_kernel(
    raw_ptr,  # [b, parts, H, H] parts of ddG Gᵀ
    stats,  # Statistics
    m_dot_ptr,  # [b, H, H], written
    gdpenalties_ptr,  # [b] what each sample adds to gdp, or None
    gdcosines_ptr,  # [b, H, H], or None
    parts,
    weight: tl.float64,
    eps: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_P: tl.constexpr,
):
    """Ṁ of (36)-(38), by sample. One program owns one sample: the parts of its ddG Gᵀ."""
    group = tl.program_id(0).to(tl.int64)
    rows = rows_of(group, group + 1, const)
    c, n = load_matrix(stats.cosines, rows, const), load_norms(stats, rows, const)
    weight, eps = as_number(weight, const.ACC), as_number(eps, const.ACC)
    product = sum_of_parts(raw_ptr, group, parts, const, BLOCK_P)
    lam, s, _ = slope(stats, rows, c, n, weight, eps, const)
    m_dot, c_dot = curvature(stats, product, c, n, lam, s, weight, eps, const)
    store_matrix(m_dot_ptr, rows, m_dot, const)
    store_cotangents(gdpenalties_ptr, gdcosines_ptr, rows, c, c_dot, weight, const)


@triton.jit
def head_penalty_double_backward_kernel(
    grads,  # Operand [b, H, n, E]
    ddgrads,  # Operand like grads
    ggrads,  # Operand like grads, written: (39)
    dgrads,  # Operand like grads, written: (35), or None
    stats,  # Statistics
    m_dot_ptr,  # [b, H, H] by sample, else None
    gdpenalties_ptr,  # [groups] by token or None
    gdcosines_ptr,  # [groups, H, H] by token or None
    groups,
    N,  # n
    span,  # elements of a part
    parts,
    weight: tl.float64,
    eps: tl.float64,
    const: tl.constexpr,  # Constants
    BLOCK_K: tl.constexpr,
):
    """Double backward, (36)-(39). One program owns the tokens of a tile, read twice, or one part of one sample."""
    rows, b, token, _, first, end = group_part(groups, parts, span, N, const)
    c, n = load_matrix(stats.cosines, rows, const), load_norms(stats, rows, const)
    weight, eps = as_number(weight, const.ACC), as_number(eps, const.ACC)
    lam, s, m = slope(stats, rows, c, n, weight, eps, const)
    if m_dot_ptr is None:
        product = gram(ddgrads, grads, rows, b, token, 0, const.E, const, BLOCK_K)
        m_dot, c_dot = curvature(stats, product, c, n, lam, s, weight, eps, const)
        store_cotangents(gdpenalties_ptr, gdcosines_ptr, rows, c, c_dot, weight, const)
    else:
        m_dot = load_matrix(m_dot_ptr, rows, const)
    for start in range(first, end, BLOCK_K):
        elements = (start + tl.arange(0, BLOCK_K)).to(const.INDEX)
        grads_tile = load_heads(grads, rows, b, token, elements, end, const)
        ddgrads_tile = load_heads(ddgrads, rows, b, token, elements, end, const)
        ggrads_tile = mixed(m, ddgrads_tile, const) + mixed(m_dot, grads_tile, const)
        store_heads(ggrads, rows, b, token, elements, end, ggrads_tile, const)
        if dgrads is not None and const.HEADS <= 32:
            store_heads(dgrads, rows, b, token, elements, end, mixed(m, grads_tile, const), const)
    if dgrads is not None and const.HEADS > 32:
        # a loop of its own: the registers do not hold all three products
        for start in range(first, end, BLOCK_K):
            elements = (start + tl.arange(0, BLOCK_K)).to(const.INDEX)
            dgrads_tile = mixed(m, load_heads(grads, rows, b, token, elements, end, const), const)
            store_heads(dgrads, rows, b, token, elements, end, dgrads_tile, const)


def constants_of(g: Grouping, *likes: Tensor) -> Constants:
    """The constants of the kernels for a problem.

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
    farthest, padded = max(reach(x, 1) for x in likes), max(4, power_of_two(g.H))
    return Constants(
        H=g.H,
        HEADS=max(16, padded),
        PADDED=padded if g.by_token and padded <= 8 else max(16, padded),
        E=x.shape[-1],
        BY_TOKEN=g.by_token,
        ACC=accumulator(x.dtype),
        INDEX=tl.int32 if max(farthest, x.shape[2] * x.shape[3]) < 2**30 else tl.int64,
        PRECISION=precision(x),
        MIXING=precision(wide),
    )


def _programs(const: Constants, groups: int, parts: int) -> int:
    """Programs of a kernel: each does one part of the groups of a tile."""
    return cdiv(groups, const.HEADS // const.PADDED) * parts


def programs_of(const: Constants, x: Tensor) -> tuple[int, int, int]:
    """Groups of ``x``, elements of a part, and parts of a group."""
    b, _, n, E = x.shape
    if const.BY_TOKEN:
        return b * n, E, 1
    span = configs.part_elements(x)
    return b, span, cdiv(n * E, span)


def products(const: Constants, x: Tensor, y: Tensor | None, raw: Tensor) -> None:
    """Parts of X Yᵀ by sample, of X Xᵀ if ``y`` is None, into ``raw`` [b, parts, H, H]."""
    plan = configs.PRODUCTS.plan(target_of(x, const.HEADS))
    groups, *sizes = programs_of(const, x)
    programs = _programs(const, groups, sizes[1])
    given = operand(x), operand(y), raw, groups, x.shape[2], *sizes
    run_kernel(plan, head_penalty_products_kernel, lambda _: programs, *given, const=const)


def statistics(
    g: Grouping,
    const: Constants,
    x: Tensor | None,
    raw: Tensor | None,
    out: Statistics,
    penalties: Tensor,
) -> None:
    """Write ``out`` and ``penalties``, (30)-(32), for the groups of ``x`` by token, of ``raw`` by sample."""
    plan = configs.STATISTICS.plan(target_of(penalties if x is None else x, const.HEADS))
    N, parts = 1 if x is None else x.shape[2], 1 if raw is None else raw.shape[1]
    groups = penalties.numel()
    given = operand(x), raw, out, penalties, groups, N, parts, g.weight, g.eps
    programs = _programs(const, groups, 1)
    run_kernel(plan, head_penalty_statistics_kernel, lambda _: programs, *given, const=const)


def backward(
    g: Grouping, const: Constants, grads: Tensor, dgrads: Tensor, stats: Statistics
) -> None:
    """Write ``dgrads``, (35), for a tile of tokens."""
    plan = configs.BACKWARD.plan(target_of(grads, const.HEADS))
    groups, *sizes = programs_of(const, grads)
    programs = _programs(const, groups, sizes[1])
    given = operand(grads), operand(dgrads), stats, groups, grads.shape[2], *sizes, g.weight, g.eps
    run_kernel(plan, head_penalty_backward_kernel, lambda _: programs, *given, const=const)


def curvatures(
    g: Grouping,
    const: Constants,
    raw: Tensor,
    stats: Statistics,
    gdpenalties: Tensor | None,
    gdcosines: Tensor | None,
) -> Tensor:
    """Write ``gdpenalties`` [b] and ``gdcosines`` of samples, and return their Ṁ [b, H, H], (37)-(38)."""
    plan = configs.CURVATURE.plan(target_of(raw, const.HEADS))
    m_dot = allocate(tuple(stats.cosines.shape), stats.cosines.dtype, raw)
    given = raw, stats, m_dot, gdpenalties, gdcosines, raw.shape[1], g.weight, g.eps
    programs = raw.shape[0]
    run_kernel(plan, head_penalty_curvature_kernel, lambda _: programs, *given, const=const)
    return m_dot


def double_backward(
    g: Grouping,
    const: Constants,
    grads: Tensor,
    ddgrads: Tensor,
    ggrads: Tensor,
    dgrads: Tensor | None,
    stats: Statistics,
    m_dot: Tensor | None,
    gdpenalties: Tensor | None,
    gdcosines: Tensor | None,
) -> None:
    """Write ``ggrads``, (39), for a tile of tokens, and ``dgrads``, (35), unless it is None.

    By token also ``gdpenalties`` and ``gdcosines``, (37); by sample ``m_dot`` is given.
    """
    plan = configs.DOUBLE_BACKWARD.plan(target_of(grads, const.HEADS))
    groups, *sizes = programs_of(const, grads)
    programs = _programs(const, groups, sizes[1])
    tensors = operand(grads), operand(ddgrads), operand(ggrads), operand(dgrads), stats, m_dot
    results = (gdpenalties, gdcosines) if m_dot is None else (None, None)
    given = *tensors, *results, groups, grads.shape[2], *sizes, g.weight, g.eps
    run_kernel(plan, head_penalty_double_backward_kernel, lambda _: programs, *given, const=const)
