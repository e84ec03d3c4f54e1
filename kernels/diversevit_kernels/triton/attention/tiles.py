"""Device functions and arguments that the attention kernels share: rows of operands, statistics, score tiles.

Shapes   q, o, do and their like [B, H, Nq, .]; k, v and theirs [B, Hkv, Nk, .], H = GROUP Hkv; mask
         [B|1, H|1, Nq|1, Nk|1] with stride 0 on axes of size 1; row statistics (Δ, η, t) [B, H, Nq], dense, and
         the softmax's, [B, H, 2, Nq]: the largest score and 1 / sum of exp(S − largest), (1a).
Dtypes   float16, bfloat16, float32, float64; products take tiles rounded to the input's dtype and accumulate
         in ``ACC``, float32 (float64 for float64), like all statistics.
Tiles    have query index ``i`` and key index ``j``; both arrive broadcast ([M, 1] and [1, N], or transposed), so
         that one function serves row programs [M, N] and column programs [N, M].
Names    ``args`` Arguments, ``out`` results, ``stats`` RowStatistics, ``const`` Constants; ``b``, ``h`` sample and
         head. ``*_qk`` is for rows of q, k and their like, of WIDTH; ``*_v`` for those of v, o and theirs, of
         VALUE_WIDTH.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime import copies
from ..runtime.device import accumulator, precision
from ..runtime.sizes import split_width
from ..runtime.tensors import Operand, allocate, check_operand, operand, reach
from ..runtime.tiles import dot, dot_nt, load_split, store_split, zeros_split
from .dropout import Dropout, dropout_of

MAX_WIDTH = 256
UNCHUNKED_WIDTH = 64
"""Up to this head width the tiles of a double backward's loop fit the registers."""
FEW_QUERIES = 16
"""Up to so many queries, one tile of 16 rows holds them all."""


class Rows(NamedTuple):
    """In a kernel: some rows of one head, and where they are."""

    tile: Any  # split tile [rows, width]
    ptr: Any  # the head's first element
    row: Any  # strides
    col: Any
    index: Any  # [rows]
    count: Any  # rows from here on are outside


class Arguments(NamedTuple):
    """The tensors that a kernel reads; None where it, or the caller, has no such tensor."""

    q: Operand  # [B, H, Nq, WIDTH]
    k: Operand  # [B, H / GROUP, Nk, WIDTH]
    v: Operand  # [B, H / GROUP, Nk, VALUE_WIDTH]
    mask: Operand | None  # [B|1, H|1, Nq|1, Nk|1], uint8 (1: attend) or additive
    H: int
    Nq: int
    Nk: int
    dropout: Dropout | None = None
    softmax: Any = None  # [B, H, 2, Nq], dense: (1a)
    o: Operand | None = None  # [B, H, Nq, VALUE_WIDTH]
    do: Operand | None = None  # like o
    dq: Operand | None = None  # like q, the result of (5)
    ddq: Operand | None = None  # like q
    ddk: Operand | None = None  # like k
    ddv: Operand | None = None  # like v
    ddmask: Operand | None = None  # like mask, additive
    end: int = 1  # a constant after all operands: else Triton before 3.8 loses their strides of 1 behind a loop


class RowStatistics(NamedTuple):
    """Numbers for each query, [B, H, Nq], dense: written by row programs for the others; None if nobody reads."""

    delta: Any  # Δ of (3)
    eta: Any = None  # η of (7); written only if HAS_DDS
    t: Any = None  # rowsum(A) of (8)
    words: Any = None  # of ``dropout``, [B, H, 2, Nq]


class Constants(NamedTuple):
    """The constants that a kernel is compiled for."""

    WIDTH: int  # d
    WIDTHS: tuple[int, ...]  # of the split tile that holds it
    VALUE_WIDTH: int
    VALUE_WIDTHS: tuple[int, ...]
    GROUP: int  # query heads per key head
    ACC: tl.dtype  # of accumulators and statistics
    INDEX: tl.dtype  # of row and key numbers: int64 where an offset inside a head needs it
    PRECISION: str  # of tl.dot
    IS_CAUSAL: bool
    BOOL_MASK: bool  # the mask's elements say whether to attend
    UNSCALED: bool  # scores are kept as products, scale times smaller (see ``scores``)
    HAS_DDS: bool  # a cotangent feeds ddS of (6)
    CHUNKED: bool  # products over the head width go piece by piece (see ``add_product``)


def chunked(const: Constants) -> Constants:
    """For kernels whose unchunked float32 tiles spill even where products are made of bfloat16 ones."""
    return const._replace(CHUNKED=const.CHUNKED or const.PRECISION == "bf16x6")


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    softmax: Tensor | None = None,
    **more: Tensor | None,
) -> tuple[Arguments, Constants]:
    """Check the tensors of a call and bundle them for a kernel; ``more`` are the optional fields of Arguments.

    Raises:
        NotImplementedError: a dtype, layout or head width without a kernel.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_operand(name, x)
        if x.shape[-1] > MAX_WIDTH:
            raise NotImplementedError(
                f"{name}: Triton attention takes head widths up to {MAX_WIDTH}, not {x.shape[-1]}"
            )
    bool_mask = mask is not None and mask.dtype == torch.bool
    if mask is not None and bool_mask and q.dtype == torch.float64:
        # Triton 3.6 and 3.8 do not compile products of float64 beside a mask of bytes
        mask = copies.write(allocate(tuple(mask.shape), q.dtype, q), mask.view(torch.uint8))
    tensors = [x for x in (q, k, v, mask, *more.values()) if x is not None]
    farthest = max(reach(x, 2) for x in tensors)
    width = widest(q, v)
    products = precision(q, "bf16x6" if width <= UNCHUNKED_WIDTH else "tf32x3")
    const = Constants(
        WIDTH=q.shape[-1],
        WIDTHS=split_width(q.shape[-1]),
        VALUE_WIDTH=v.shape[-1],
        VALUE_WIDTHS=split_width(v.shape[-1]),
        GROUP=q.shape[1] // k.shape[1],
        ACC=accumulator(q.dtype),
        INDEX=tl.int32 if farthest < 2**30 else tl.int64,
        PRECISION=products,
        IS_CAUSAL=is_causal,
        BOOL_MASK=bool_mask,
        UNSCALED=(mask is None or bool_mask) and _is_power_of_two(scale),
        CHUNKED=products == "tf32x3" or ("dq" in more and width > UNCHUNKED_WIDTH),
        HAS_DDS=any(more.get(name) is not None for name in ("ddq", "ddk", "ddmask")),
    )
    read = {name: operand(x) for name, x in {"q": q, "k": k, "v": v, "mask": mask, **more}.items()}
    sizes = {"H": q.shape[1], "Nq": q.shape[2], "Nk": k.shape[2]}
    dropout = dropout_of(seed, dropout_p)
    return Arguments(dropout=dropout, softmax=copies.dense(softmax), **sizes, **read), const  # pyright: ignore[reportArgumentType]


def _is_power_of_two(scale: float) -> bool:
    """Whether multiplying by ``scale``, and by one over it, is exact."""
    return 2.0**-64 < scale < 2.0**64 and math.frexp(scale)[0] == 0.5


def widest(q: Tensor, v: Tensor) -> int:
    """The larger of the head's width and its values', by which launches are configured."""
    return max(q.shape[-1], v.shape[-1])


def empty_statistic(q: Tensor) -> Tensor:
    """Uninitialised ``[B, H, Nq]``, dense, in the accumulator's dtype."""
    return allocate(tuple(q.shape[:3]), accumulation_dtype(q.dtype), q)


def empty_softmax(q: Tensor) -> Tensor:
    """Uninitialised ``[B, H, 2, Nq]``, dense, in the accumulator's dtype."""
    B, H, Nq, _ = q.shape
    return allocate((B, H, 2, Nq), accumulation_dtype(q.dtype), q)


@triton.jit
def program_tile(tiles, heads):
    """(sample, head, tile) of this program; tiles of a head are neighbours, so they share the L2 cache."""
    program = tl.program_id(0).to(tl.int64)
    return program // tiles // heads, program // tiles % heads, program % tiles


@triton.jit
def indices(first, BLOCK: tl.constexpr, const: tl.constexpr):
    """The BLOCK rows (or keys) from ``first`` on."""
    return (first + tl.arange(0, BLOCK)).to(const.INDEX)


@triton.jit
def head_of(x, b, h):
    """Where head ``h`` of sample ``b`` begins."""
    return x.ptr + b * x.sample + h * x.head


@triton.jit
def load_rows(x, b, h, rows, n, WIDTH: tl.constexpr, WIDTHS: tl.constexpr):
    """Load rows of one head, zero from row ``n`` on, as Rows; None of None."""
    if x is None:
        return  # not "return None": Triton before 3.8 makes a tensor of it
    else:
        ptr = head_of(x, b, h)
        tile = load_split(ptr, x.row, x.col, rows, rows < n, WIDTH, WIDTHS)
        return Rows(tile, ptr, x.row, x.col, rows, n)


@triton.jit
def load_qk(x, b, h, rows, n, const: tl.constexpr):
    """``load_rows`` of q, k or their like."""
    return load_rows(x, b, h, rows, n, const.WIDTH, const.WIDTHS)


@triton.jit
def load_v(x, b, h, rows, n, const: tl.constexpr):
    """``load_rows`` of v, o or their like."""
    return load_rows(x, b, h, rows, n, const.VALUE_WIDTH, const.VALUE_WIDTHS)


@triton.jit
def store_qk(x, b, h, rows, n, tile, const: tl.constexpr):
    """The inverse of ``load_qk``."""
    at = head_of(x, b, h)
    store_split(at, x.row, x.col, rows, rows < n, tile, const.WIDTH, const.WIDTHS)


@triton.jit
def store_v(x, b, h, rows, n, tile, const: tl.constexpr):
    """The inverse of ``load_v``."""
    at = head_of(x, b, h)
    store_split(at, x.row, x.col, rows, rows < n, tile, const.VALUE_WIDTH, const.VALUE_WIDTHS)


@triton.jit
def zeros_qk(ROWS: tl.constexpr, const: tl.constexpr):
    """A split tile of zeros for sums of rows of q or k."""
    return zeros_split(ROWS, const.WIDTHS, const.ACC)


@triton.jit
def zeros_v(ROWS: tl.constexpr, const: tl.constexpr):
    """A split tile of zeros for sums of rows of v or o."""
    return zeros_split(ROWS, const.VALUE_WIDTHS, const.ACC)


@triton.jit
def load_statistic(ptr, args, b, h, rows):
    """Load [rows] of a dense [B, H, Nq]; 0 beyond its end."""
    return tl.load(ptr + (b * args.H + h) * args.Nq + rows, mask=rows < args.Nq, other=0.0)


@triton.jit
def store_statistic(ptr, args, b, h, rows, value):
    """The inverse of ``load_statistic``; nothing to None."""
    if ptr is not None:
        tl.store(ptr + (b * args.H + h) * args.Nq + rows, value, mask=rows < args.Nq)


@triton.jit
def load_softmax(args, b, h, rows, scale, const: tl.constexpr):
    """Load the largest of ``scores`` and the share of each of ``rows``, (1a); plus infinity and 0 beyond the end."""
    at = args.softmax + 2 * (b * args.H + h) * args.Nq + rows
    top = tl.load(at, mask=rows < args.Nq, other=float("inf"))
    if const.UNSCALED:
        top *= 1.0 / scale
    return top, tl.load(at + args.Nq, mask=rows < args.Nq, other=0.0)


@triton.jit
def store_softmax(ptr, args, b, h, rows, top, share, scale, const: tl.constexpr):
    """The inverse of ``load_softmax``."""
    if const.UNSCALED:
        top *= scale
    at = ptr + 2 * (b * args.H + h) * args.Nq + rows
    tl.store(at, top, mask=rows < args.Nq)
    tl.store(at + args.Nq, share, mask=rows < args.Nq)


@triton.jit
def row_delta(args, stats, do, b, h, rows, const: tl.constexpr):
    """Δ of (3), rowsum(dO ∘ O) of a row tile, [rows]; also written to ``stats`` for other programs."""
    o = load_v(args.o, b, h, rows, args.Nq, const)
    delta = tl.zeros([rows.shape[0]], const.ACC)
    for i in tl.static_range(len(const.VALUE_WIDTHS)):
        delta += tl.sum(o.tile[i].to(const.ACC) * do.tile[i].to(const.ACC), 1)
    store_statistic(stats.delta, args, b, h, rows, delta)
    return delta


@triton.jit
def row_delta_of_few_queries(args, stats, do, b, h, rows, const: tl.constexpr):
    """``row_delta`` summed in the order of dP.

    Where one key has all the weight, o is its v, and dP − Δ is exactly 0.
    """
    o = load_v(args.o, b, h, rows, args.Nq, const)
    products = value_product(do, o, const)
    delta = tl.sum(tl.where(rows[:, None] == rows[None, :], products, 0.0), 1)
    store_statistic(stats.delta, args, b, h, rows, delta)
    return delta


@triton.jit
def value_product(x, y, const: tl.constexpr):
    """The product x yᵀ of rows of o and v or their like, as dP = dO Vᵀ: [rows of x, rows of y]."""
    acc = tl.zeros([x.index.shape[0], y.index.shape[0]], const.ACC)
    return add_product(acc, x, y, const.VALUE_WIDTH, const)


@triton.jit
def add_product(acc, x, y, WIDTH: tl.constexpr, const: tl.constexpr):
    """Add the product x yᵀ of two Rows of WIDTH columns to ``acc``.

    Where CHUNKED, both are read again from the L1 cache, CHUNK columns at a time: for loops whose tiles do not fit the
    registers. Three TF32 products split an operand in two; a double backward's loop has seven of them.
    """
    CHUNK: tl.constexpr = 16
    if const.CHUNKED:
        for start in range(0, WIDTH, CHUNK):
            cols = start + tl.arange(0, CHUNK)
            x_part, y_part = _columns(x, cols, WIDTH), _columns(y, cols, WIDTH)
            acc = dot(x_part, tl.trans(y_part), acc, const.PRECISION)
        return acc
    else:
        return dot_nt(x.tile, y.tile, acc, const.PRECISION)


@triton.jit
def _columns(x, cols, WIDTH: tl.constexpr):
    at = x.index[:, None] * x.row + cols[None, :] * x.col
    mask = (x.index < x.count)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(x.ptr + at, mask=mask, other=0.0)


@triton.jit
def mask_tile(mask, b, h, i, j, inside):
    """Elements (i, j) of a mask, zero outside."""
    return tl.load(head_of(mask, b, h) + i * mask.row + j * mask.col, mask=inside, other=0)


@triton.jit
def scores(
    x, y, args, b, h, i, j, scale, const: tl.constexpr, KEYS_BEYOND_END: tl.constexpr = False
):
    """Scores, (1): S = scale x yᵀ + mask, minus infinity where a query may not look or no key ``j`` exists.

    Where UNSCALED, S / scale: scale is a power of two and nothing is added, so this is as exact and saves a product.
    ``x, y`` are q and k, or k and q for a transposed tile. KEYS_BEYOND_END: keys that do not exist may have any score,
    as what becomes of them is neither stored nor added to anything that is.
    """
    s = tl.zeros([x.index.shape[0], y.index.shape[0]], const.ACC)
    s = add_product(s, x, y, const.WIDTH, const)
    if not const.UNSCALED:
        s *= scale
    visible = j < args.Nk
    if args.mask is not None:
        tile = mask_tile(args.mask, b, h, i, j, (i < args.Nq) & visible)
        if const.BOOL_MASK:
            visible = tile != 0
        else:
            s += tile.to(const.ACC)
    if const.IS_CAUSAL:
        visible = visible & (j <= i)
    if KEYS_BEYOND_END and const.UNSCALED and args.mask is None and not const.IS_CAUSAL:
        return s
    else:
        # never scale x yᵀ bare: the compiler would make one instruction of it and "− top", and 0 of neither
        return tl.where(visible, s, float("-inf"))


@triton.jit
def exp_of_scores(s, scale, const: tl.constexpr):
    """exp(S) of differences S of ``scores``. A power of two is one instruction, tl.exp five."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if const.UNSCALED:
        return tl.exp2(s * (scale * LOG2_E))
    else:
        return tl.exp2(s * LOG2_E)


@triton.jit
def probabilities(
    x,
    y,
    top,
    share,
    args,
    b,
    h,
    i,
    j,
    scale,
    const: tl.constexpr,
    KEYS_BEYOND_END: tl.constexpr = False,
):
    """Probabilities, (1a): P = exp(S − top) share; zero where S is minus infinity or ``top`` plus infinity.

    ``top`` and ``share`` are broadcast. Subtract before exponentiating: if one key has all the weight and S was summed
    in the same order as in the forward, S − top is exactly 0 and P exactly 1. (Where CHUNKED, the order may differ.)
    """
    s = scores(x, y, args, b, h, i, j, scale, const, KEYS_BEYOND_END)
    return exp_of_scores(s - top, scale, const) * share


@triton.jit
def probabilities_of_all_keys(q, k, top, args, b, h, i, j, scale, const: tl.constexpr):
    """Probabilities, (1a), of a tile that holds all keys of its rows: divided by its own row sum."""
    s = scores(q, k, args, b, h, i, j, scale, const)
    p = exp_of_scores(s - top, scale, const)
    return p * share_of(tl.sum(p, 1))[:, None]


@triton.jit
def share_of(total):
    """One over the sum of a row's weights; 1 where it attends to nothing."""
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def score_cotangent(ddq, k, q, ddk, args, b, h, i, j, scale, const: tl.constexpr):
    """Cotangent of dS, (6): ddS = scale (ddQ Kᵀ + Q ddKᵀ) + ddmask; an absent cotangent costs nothing.

    For a transposed tile the four Rows are k, ddq, ddk, q.
    """
    dds = tl.zeros((i + j).shape, const.ACC)
    if args.ddq is not None:
        dds = add_product(dds, ddq, k, const.WIDTH, const)
    if args.ddk is not None:
        dds = add_product(dds, q, ddk, const.WIDTH, const)
    dds *= scale
    if args.ddmask is not None:
        inside = (i < args.Nq) & (j < args.Nk)
        dds += mask_tile(args.ddmask, b, h, i, j, inside).to(const.ACC)
    return dds


@triton.jit
def last_key(tile, args, BLOCK_M: tl.constexpr, const: tl.constexpr):
    """One past the last key that the rows of a tile may see."""
    if const.IS_CAUSAL:
        return tl.minimum(args.Nk, (tile + 1) * BLOCK_M)
    else:
        return args.Nk


@triton.jit
def first_row_tile(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, const: tl.constexpr):
    """The first row tile that may see a key of key tile ``tile``."""
    if const.IS_CAUSAL:
        return tile * BLOCK_N // BLOCK_M
    else:
        return tile * 0
