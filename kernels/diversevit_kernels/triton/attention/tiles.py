"""What every attention kernel shares: its operands, where a program works, score tiles.

Shapes   q, o, do and their like [B, H, Nq, .]; k, v and theirs [B, Hkv, Nk, .], H = GROUP Hkv; mask
         [B|1, H|1, Nq|1, Nk|1] with stride 0 on axes of size 1; row statistics (D, x, t) [B, H, Nq], dense, and the
         softmax's, [B, H, 2, Nq]: the largest score and 1 / sum of exp(S − largest), (1a).
Dtypes   float16, bfloat16, float32, float64; products take tiles rounded to the input's dtype and accumulate
         in ``ACC``, float32 (float64 for float64), like all statistics.
Tiles    have query index ``i`` and key index ``j``; both arrive broadcast ([M, 1] and [1, N], or transposed), so
         that one function serves row programs [M, N] and column programs [N, M].
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime.configurations import accumulator, precision
from ..runtime.launch import allocate, check_operand, reach, split_width
from ..runtime.tiles import INTERPRETED, dot, dot_nt, load_split, store_split

MAX_WIDTH = 256
CHUNK = tl.constexpr(16)
"""Columns that a chunked product reads at a time."""
UNCHUNKED_WIDTH = 64
"""Up to this head width the tiles of a double backward's loop fit the registers."""
FEW_QUERIES = 16
"""Up to so many queries, one tile of 16 rows holds them all."""


class Operand(NamedTuple):
    """A tensor [B, H, N, .] and its strides; in a kernel its ``ptr`` is a pointer."""

    ptr: Any
    sample: int
    head: int
    row: int
    col: int


class Rows(NamedTuple):
    """In a kernel: some rows of one head, and where they are."""

    tile: Any  # split tile [rows, width]
    ptr: Any  # the head's first element
    row: Any  # strides
    col: Any
    index: Any  # [rows]
    count: Any  # rows from here on are outside


class Problem(NamedTuple):
    """What a kernel reads; None where a rung, or a caller, has no such tensor."""

    q: Operand  # [B, H, Nq, WIDTH]
    k: Operand  # [B, H / GROUP, Nk, WIDTH]
    v: Operand  # [B, H / GROUP, Nk, VALUE_WIDTH]
    mask: Operand | None  # [B|1, H|1, Nq|1, Nk|1], uint8 (1: attend) or additive
    H: int
    Nq: int
    Nk: int
    softmax: Any = None  # [B, H, 2, Nq], dense: (1a)
    o: Operand | None = None  # [B, H, Nq, VALUE_WIDTH]
    do: Operand | None = None  # like o: dO
    dq: Operand | None = None  # like q, the result of (5)
    ddq: Operand | None = None  # like q: A
    ddk: Operand | None = None  # like k: B
    ddv: Operand | None = None  # like v: C
    ddmask: Operand | None = None  # like mask, additive: A_M
    end: int = 1  # a constant after all operands: else Triton before 3.8 loses their strides of 1 behind a loop


class Static(NamedTuple):
    """What is known when a kernel is compiled."""

    WIDTH: int  # d
    WIDTHS: tuple[int, ...]  # of the split tile that holds it
    VALUE_WIDTH: int
    VALUE_WIDTHS: tuple[int, ...]
    GROUP: int  # query heads per key head
    ACC: tl.dtype  # of accumulators and statistics
    INDEX: tl.dtype  # of row and key numbers: int64 where an offset inside a head needs it
    PRECISION: str  # of tl.dot
    IS_CAUSAL: bool
    HAS_X: bool  # a cotangent feeds X of (6)
    CHUNKED: bool  # products over the head width go piece by piece (see ``add_product``)


def chunked(S: Static) -> Static:
    """For kernels whose whole float32 tiles spill even where products are made of bfloat16 ones."""
    return S._replace(CHUNKED=S.CHUNKED or S.PRECISION == "bf16x6")


def operand(x: Tensor | None) -> Operand | None:
    """A tensor with its strides; axes of size 1 get stride 0, so that masks broadcast."""
    if x is None:
        return None
    data = x.view(torch.uint8) if x.dtype == torch.bool else x
    return Operand(data, *[0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)])


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    softmax: Tensor | None = None,
    **more: Tensor | None,
) -> tuple[Problem, Static]:
    """The arguments of a kernel, checked.

    Raises:
        NotImplementedError: a dtype, layout or head width without a kernel.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_operand(name, x)
        if x.shape[-1] > MAX_WIDTH:
            raise NotImplementedError(
                f"{name}: Triton attention takes head widths up to {MAX_WIDTH}, not {x.shape[-1]}"
            )
    if mask is not None and mask.dtype == torch.bool and q.dtype == torch.float64:
        # Triton 3.6 and 3.8 do not compile products of float64 beside a mask of bytes
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    tensors = [x for x in (q, k, v, mask, *more.values()) if x is not None]
    farthest = max(reach(x, 2) for x in tensors)
    width = max(q.shape[-1], v.shape[-1])
    products = precision(q, "bf16x6" if width <= UNCHUNKED_WIDTH else "tf32x3")
    static = Static(
        WIDTH=q.shape[-1],
        WIDTHS=split_width(q.shape[-1]),
        VALUE_WIDTH=v.shape[-1],
        VALUE_WIDTHS=split_width(v.shape[-1]),
        GROUP=q.shape[1] // k.shape[1],
        ACC=accumulator(q.dtype),
        INDEX=tl.int32 if farthest < 2**30 else tl.int64,
        PRECISION=products,
        IS_CAUSAL=is_causal,
        CHUNKED=products == "tf32x3" or ("dq" in more and width > UNCHUNKED_WIDTH),
        HAS_X=any(more.get(name) is not None for name in ("ddq", "ddk", "ddmask")),
    )
    read = {name: operand(x) for name, x in {"q": q, "k": k, "v": v, "mask": mask, **more}.items()}
    sizes = {"H": q.shape[1], "Nq": q.shape[2], "Nk": k.shape[2]}
    softmax = None if softmax is None else softmax.contiguous()
    return Problem(softmax=softmax, **sizes, **read), static  # pyright: ignore[reportArgumentType]


def empty_heads(like: Tensor) -> Tensor:
    """Uninitialised, shaped like ``like`` [B, H, N, .] and laid out as ``[B, N, H, .]``, what a projection reads."""
    B, H, N, width = like.shape
    return allocate((B, N, H, width), like.dtype, like).transpose(1, 2)


def empty_statistic(q: Tensor) -> Tensor:
    """Uninitialised ``[B, H, Nq]``, dense, in the accumulator's dtype."""
    return allocate(tuple(q.shape[:3]), accumulation_dtype(q.dtype), q)


def empty_softmax(q: Tensor) -> Tensor:
    """Uninitialised ``[B, H, 2, Nq]``, dense, in the accumulator's dtype."""
    B, H, Nq, _ = q.shape
    return allocate((B, H, 2, Nq), accumulation_dtype(q.dtype), q)


@triton.jit
def as_number(x, ACC: tl.constexpr):
    """A float64 scalar argument in the accumulator's dtype (interpreted, it is a Python number)."""
    if INTERPRETED:
        return tl.full([], x, ACC)
    else:
        return x.to(ACC)


@triton.jit
def program_tile(tiles, heads):
    """(sample, head, tile) of this program; tiles of a head are neighbours, so they share the L2 cache."""
    program = tl.program_id(0).to(tl.int64)
    return program // tiles // heads, program // tiles % heads, program % tiles


@triton.jit
def indices(first, BLOCK: tl.constexpr, S: tl.constexpr):
    """The BLOCK rows (or keys) from ``first`` on."""
    return (first + tl.arange(0, BLOCK)).to(S.INDEX)


@triton.jit
def head_of(x, b, h):
    """Where head ``h`` of sample ``b`` begins."""
    return x.ptr + b * x.sample + h * x.head


@triton.jit
def load_rows(x, b, h, rows, n, WIDTH: tl.constexpr, WIDTHS: tl.constexpr):
    """Rows of one head, zero from row ``n`` on, as Rows; None of None."""
    if x is None:
        return  # not "return None": Triton before 3.8 makes a tensor of it
    else:
        ptr = head_of(x, b, h)
        tile = load_split(ptr, x.row, x.col, rows, rows < n, WIDTH, WIDTHS)
        return Rows(tile, ptr, x.row, x.col, rows, n)


@triton.jit
def store_rows(x, b, h, rows, n, tile, WIDTH: tl.constexpr, WIDTHS: tl.constexpr):
    """The inverse of ``load_rows``."""
    store_split(head_of(x, b, h), x.row, x.col, rows, rows < n, tile, WIDTH, WIDTHS)


@triton.jit
def load_statistic(ptr, P, b, h, rows, other):
    """[rows] of a dense [B, H, Nq]; ``other`` beyond its end."""
    return tl.load(ptr + (b * P.H + h) * P.Nq + rows, mask=rows < P.Nq, other=other)


@triton.jit
def store_statistic(ptr, P, b, h, rows, value):
    """The inverse of ``load_statistic``."""
    tl.store(ptr + (b * P.H + h) * P.Nq + rows, value, mask=rows < P.Nq)


@triton.jit
def load_softmax(P, b, h, rows):
    """(1a): the largest score and the share of each of ``rows``; plus infinity and 0 beyond the end."""
    at = P.softmax + 2 * (b * P.H + h) * P.Nq + rows
    top = tl.load(at, mask=rows < P.Nq, other=float("inf"))
    return top, tl.load(at + P.Nq, mask=rows < P.Nq, other=0.0)


@triton.jit
def store_softmax(ptr, P, b, h, rows, top, share):
    """The inverse of ``load_softmax``."""
    at = ptr + 2 * (b * P.H + h) * P.Nq + rows
    tl.store(at, top, mask=rows < P.Nq)
    tl.store(at + P.Nq, share, mask=rows < P.Nq)


@triton.jit
def row_delta(P, R_delta, do, b, h, rows, S: tl.constexpr):
    """(3): D = rowsum(do ∘ o) of a row tile, [rows]; also written to ``R_delta`` for other programs."""
    o = load_rows(P.o, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    delta = tl.zeros([rows.shape[0]], S.ACC)
    for i in tl.static_range(len(S.VALUE_WIDTHS)):
        delta += tl.sum(o.tile[i].to(S.ACC) * do.tile[i].to(S.ACC), 1)
    store_statistic(R_delta, P, b, h, rows, delta)
    return delta


@triton.jit
def few_delta(P, delta_ptr, do, b, h, rows, S: tl.constexpr):
    """``row_delta`` summed as dP is: where one key takes all, o is its v, and dP − D is 0 to the last bit."""
    o = load_rows(P.o, b, h, rows, P.Nq, S.VALUE_WIDTH, S.VALUE_WIDTHS)
    every = product(do, o, S.VALUE_WIDTH, S)
    delta = tl.sum(tl.where(rows[:, None] == rows[None, :], every, 0.0), 1)
    store_statistic(delta_ptr, P, b, h, rows, delta)
    return delta


@triton.jit
def product(x, y, WIDTH: tl.constexpr, S: tl.constexpr):
    """x yᵀ of two Rows of ``WIDTH`` columns: [rows of x, rows of y]."""
    acc = tl.zeros([x.index.shape[0], y.index.shape[0]], S.ACC)
    return add_product(acc, x, y, WIDTH, S)


@triton.jit
def add_product(acc, x, y, WIDTH: tl.constexpr, S: tl.constexpr):
    """acc + x yᵀ.

    S.CHUNKED reads both operands again, CHUNK columns at a time, from the L1 cache: where a loop's tiles do not
    fit the registers. Three TF32 products split an operand in two; a double backward's loop has seven of them.
    """
    if S.CHUNKED:
        for start in range(0, WIDTH, CHUNK):
            cols = start + tl.arange(0, CHUNK)
            acc = dot(
                _columns(x, cols, WIDTH), tl.trans(_columns(y, cols, WIDTH)), acc, S.PRECISION
            )
        return acc
    else:
        return dot_nt(x.tile, y.tile, acc, S.PRECISION)


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
def scores(x, y, P, b, h, i, j, scale, S: tl.constexpr):
    """(1): S = s x yᵀ + M, minus infinity where a query may not look or no pair (i, j) exists.

    ``x, y`` are q and k, or k and q for a transposed tile.
    """
    s = product(x, y, S.WIDTH, S) * scale
    inside = (i < P.Nq) & (j < P.Nk)
    if P.mask is not None:
        tile = mask_tile(P.mask, b, h, i, j, inside)
        if P.mask.ptr.dtype.element_ty == tl.uint8:
            inside = inside & (tile != 0)
        else:
            s += tile.to(S.ACC)
    if S.IS_CAUSAL:
        inside = inside & (j <= i)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def probabilities(x, y, top, share, P, b, h, i, j, scale, S: tl.constexpr):
    """(1a): exp(S − top) share; zero wherever S is minus infinity or ``top`` plus infinity. Both are broadcast.

    The difference first: where one key takes all and S was summed in the order of the forward's (S.CHUNKED may sum in
    another), it is 0 and P exactly 1.
    """
    return tl.exp(scores(x, y, P, b, h, i, j, scale, S) - top) * share


@triton.jit
def whole_probabilities(q, k, top, P, b, h, i, j, scale, S: tl.constexpr):
    """(1a) of a tile that holds all keys of its rows: the sum is its own, whatever order S was summed in."""
    p = tl.exp(scores(q, k, P, b, h, i, j, scale, S) - top)
    total = tl.sum(p, 1)
    return p * share_of(total)[:, None]


@triton.jit
def share_of(total):
    """One over the sum of a row's weights; 1 where it attends to nothing."""
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@triton.jit
def score_cotangent(a, k, q, b_k, P, b, h, i, j, scale, S: tl.constexpr):
    """(6): X = s (A Kᵀ + Q Bᵀ) + A_M at queries ``i`` and keys ``j``; an absent cotangent costs nothing.

    ``a, k, q, b_k`` are the Rows of A, K, Q, B; for a transposed tile Xᵀ those of K, A, B, Q.
    """
    x = tl.zeros((i + j).shape, S.ACC)
    if P.ddq is not None:
        x = add_product(x, a, k, S.WIDTH, S)
    if P.ddk is not None:
        x = add_product(x, q, b_k, S.WIDTH, S)
    x *= scale
    if P.ddmask is not None:
        x += mask_tile(P.ddmask, b, h, i, j, (i < P.Nq) & (j < P.Nk)).to(S.ACC)
    return x


@triton.jit
def last_key(tile, P, BLOCK_M: tl.constexpr, S: tl.constexpr):
    """One past the last key that the rows of a tile may see."""
    if S.IS_CAUSAL:
        return tl.minimum(P.Nk, (tile + 1) * BLOCK_M)
    else:
        return P.Nk


@triton.jit
def first_row_tile(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, S: tl.constexpr):
    """The first row tile that may see a key of key tile ``tile``."""
    if S.IS_CAUSAL:
        return tile * BLOCK_N // BLOCK_M
    else:
        return tile * 0
