"""The products of the routed penalty, (40), (42), (43), (45) of kernels/README.md, for a tile of tokens.

Letters  t a token of the tile, in row-major order of its samples and tokens; j one of a head's 3d gradients, piece
         (query, key, value) by piece; e a channel of the model.
Shapes   r and its like [b, n, 3, H, d] and W and its like [3, H, d, D], any strides; u and its like
         [b n, H, D], dense, in the accumulation dtype.
Dtypes   products read r and W in their common dtype, or in that of du where du takes part; they accumulate in ACC:
         float32 (float64 for float64), in which u is kept, since cosines are that exact. du, which returns to r and W
         and meets no other head, is kept in bfloat16 if these are: its rounding is one of the results' size. float16
         would not hold it: 1 / n of (34) leaves its range.
Pairs    every kernel sums one product or two; the second is left out where an operand of it is None.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime.device import accumulator, fills, precision
from ..runtime.launch import run_kernel
from ..runtime.plan import Configuration, target_of
from ..runtime.sizes import cdiv
from ..runtime.sums import sum_over_programs
from ..runtime.tensors import allocate, check_operand, reach
from ..runtime.tiles import dot
from . import configs

MOST_PARTS = 32
"""Programs that share the tokens of a weight's gradient: bounds the memory of their sums."""
_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class RoutedGradients(NamedTuple):
    """Gradients [b, n, 3, H, d] and their strides; in a kernel ``ptr`` is a pointer."""

    ptr: Any
    sample: int
    token: int
    piece: int
    head: int
    col: int


class Weight(NamedTuple):
    """A weight [3, H, d, D] and its strides; in a kernel ``ptr`` is a pointer."""

    ptr: Any
    piece: int
    head: int
    row: int
    col: int


class RoutedConstants(NamedTuple):
    """Constants of a kernel: known when it is compiled."""

    H: int
    d: int
    D: int
    ACC: tl.dtype  # of u and of accumulators
    DTYPE: tl.dtype  # that r and W are read in where u is made: their common one
    INDEX: tl.dtype  # of positions inside a token or a weight: int64 where an offset needs it
    PRECISION: str  # of products in DTYPE
    RETURN: str  # of products with du


@triton.jit
def head_tiles(rows, columns):
    """Head, row tile and column tile of this program; tiles of a head are neighbours."""
    program = tl.program_id(0).to(tl.int64)
    return program // (rows * columns), program // columns % rows, program % columns


@triton.jit
def numbers(tile, BLOCK: tl.constexpr):
    """The rows or columns of a tile, int64 like ``tile``."""
    return tile * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def rows_places(r, h, t, j, tokens, N, const: tl.constexpr):
    """Addresses of [t, j] in head ``h`` of RoutedGradients, and which of them exist."""
    row = r.ptr + h * r.head + t // N * r.sample + t % N * r.token
    along = j // const.d * r.piece + j % const.d * r.col
    return row[:, None] + along[None, :], (t < tokens)[:, None] & (j < 3 * const.d)[None, :]


@triton.jit
def load_rows(r, h, t, j, tokens, N, const: tl.constexpr):
    """Load [t, j] of head ``h``, zero outside."""
    at, inside = rows_places(r, h, t, j, tokens, N, const)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_weight(w, h, j, e, const: tl.constexpr):
    """Load [j, e] of head ``h``, zero outside."""
    row = j // const.d * w.piece + j % const.d * w.row
    inside = (j < 3 * const.d)[:, None] & (e < const.D)[None, :]
    return tl.load(w.ptr + h * w.head + row[:, None] + (e * w.col)[None, :], mask=inside, other=0.0)


@triton.jit
def routed_places(u_ptr, h, t, e, tokens, const: tl.constexpr):
    """Addresses of [t, e] in head ``h`` of u, and which of them exist."""
    at = u_ptr + h * const.D + t[:, None] * (const.H * const.D) + e[None, :]
    return at, (t < tokens)[:, None] & (e < const.D)[None, :]


@triton.jit
def load_routed(u_ptr, h, t, e, tokens, const: tl.constexpr):
    """Load [t, e] of head ``h``, zero outside."""
    at, inside = routed_places(u_ptr, h, t, e, tokens, const)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def routed_penalty_route_kernel(
    r,  # RoutedGradients
    w,  # Weight
    r_two,  # RoutedGradients, or None
    w_two,  # Weight, or None like r_two
    u_ptr,  # [tokens, H, D], written
    tokens,
    N,  # n: tokens of a sample
    const: tl.constexpr,  # RoutedConstants
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Route, (40) or (43): u_h = r_h W_h (+ the second pair).

    One program owns BLOCK_T tokens x BLOCK_E channels of one head.
    """
    h, row, column = head_tiles(tl.cdiv(tokens, BLOCK_T), tl.cdiv(const.D, BLOCK_E))
    t, e = numbers(row, BLOCK_T), numbers(column, BLOCK_E).to(const.INDEX)
    u = tl.zeros([BLOCK_T, BLOCK_E], const.ACC)
    for start in range(0, 3 * const.d, BLOCK_J):
        j = (start + tl.arange(0, BLOCK_J)).to(const.INDEX)
        r_tile = load_rows(r, h, t, j, tokens, N, const).to(const.DTYPE)
        u = dot(r_tile, load_weight(w, h, j, e, const).to(const.DTYPE), u, const.PRECISION)
        if r_two is not None:
            r_tile = load_rows(r_two, h, t, j, tokens, N, const).to(const.DTYPE)
            u = dot(r_tile, load_weight(w_two, h, j, e, const).to(const.DTYPE), u, const.PRECISION)
    at, inside = routed_places(u_ptr, h, t, e, tokens, const)
    tl.store(at, u, mask=inside)


@triton.jit
def routed_penalty_route_back_kernel(
    u_ptr,  # [tokens, H, D]: du, or gu
    w,  # Weight
    u_two_ptr,  # [tokens, H, D], or None
    w_two,  # Weight, or None like u_two_ptr
    r,  # RoutedGradients, written
    tokens,
    N,  # n: tokens of a sample
    const: tl.constexpr,  # RoutedConstants
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Route back, (42) or (45): r_h = u_h W_hᵀ (+ the second pair).

    One program owns BLOCK_T tokens x BLOCK_J gradients of one head.
    """
    h, row, column = head_tiles(tl.cdiv(tokens, BLOCK_T), tl.cdiv(3 * const.d, BLOCK_J))
    t, j = numbers(row, BLOCK_T), numbers(column, BLOCK_J).to(const.INDEX)
    total = tl.zeros([BLOCK_T, BLOCK_J], const.ACC)
    for start in range(0, const.D, BLOCK_E):
        e = (start + tl.arange(0, BLOCK_E)).to(const.INDEX)
        u_tile = load_routed(u_ptr, h, t, e, tokens, const)
        w_tile = load_weight(w, h, j, e, const).to(u_tile.dtype)
        total = dot(u_tile, tl.trans(w_tile), total, const.RETURN)
        if u_two_ptr is not None:
            u_tile = load_routed(u_two_ptr, h, t, e, tokens, const)
            w_tile = load_weight(w_two, h, j, e, const).to(u_tile.dtype)
            total = dot(u_tile, tl.trans(w_tile), total, const.RETURN)
    at, inside = rows_places(r, h, t, j, tokens, N, const)
    tl.store(at, total.to(r.ptr.dtype.element_ty), mask=inside)


@triton.jit
def routed_penalty_weight_kernel(
    r,  # RoutedGradients
    u_ptr,  # [tokens, H, D]: du, or gu
    r_two,  # RoutedGradients, or None
    u_two_ptr,  # [tokens, H, D], or None like r_two
    before_ptr,  # [parts, 3, H, d, D] of the tiles of tokens before this one, or None
    sums_ptr,  # like before_ptr, written
    tokens,
    N,  # n: tokens of a sample
    parts,
    const: tl.constexpr,  # RoutedConstants
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gradient of a weight, (42) or (45): W_h = r_hᵀ u_h (+ the second pair), summed over tokens.

    One program owns BLOCK_J gradients x BLOCK_E channels of one head, of one part: every ``parts``-th BLOCK_T tokens.
    """
    columns = tl.cdiv(const.D, BLOCK_E)
    h, part, tile = head_tiles(parts, tl.cdiv(3 * const.d, BLOCK_J) * columns)
    j = numbers(tile // columns, BLOCK_J).to(const.INDEX)
    e = numbers(tile % columns, BLOCK_E).to(const.INDEX)
    row = ((part * 3 + j // const.d) * const.H + h) * const.d + j % const.d
    at, inside = (
        (row * const.D)[:, None] + e[None, :],
        (j < 3 * const.d)[:, None] & (e < const.D)[None, :],
    )
    if before_ptr is None:
        sums = tl.zeros([BLOCK_J, BLOCK_E], const.ACC)
    else:
        sums = tl.load(before_ptr + at, mask=inside, other=0.0)
    for start in range(part * BLOCK_T, tokens, parts * BLOCK_T):
        t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        u_tile = load_routed(u_ptr, h, t, e, tokens, const)
        r_tile = load_rows(r, h, t, j, tokens, N, const).to(u_tile.dtype)
        sums = dot(tl.trans(r_tile), u_tile, sums, const.RETURN)
        if r_two is not None:
            u_tile = load_routed(u_two_ptr, h, t, e, tokens, const)
            r_tile = load_rows(r_two, h, t, j, tokens, N, const).to(u_tile.dtype)
            sums = dot(tl.trans(r_tile), u_tile, sums, const.RETURN)
    tl.store(sums_ptr + at, sums, mask=inside)


def constants_of(r: Tensor, w: Tensor, *others: Tensor | None) -> RoutedConstants:
    """The constants of the kernels for r [B, N, 3, H, d], W [3, H, d, D], and others like either.

    Raises:
        NotImplementedError: a dtype or layout without a kernel.
    """
    tensors = [x for x in (r, w, *others) if x is not None]
    for x in tensors:
        check_operand("grad_qkv" if x.ndim == 5 else "weight_qkv", x)
    common = torch.promote_types(r.dtype, w.dtype)
    farthest = max(reach(x, 2 if x.ndim == 5 else 0) for x in tensors)
    return RoutedConstants(
        H=r.shape[3],
        d=r.shape[4],
        D=w.shape[3],
        ACC=accumulator(common),
        DTYPE=_DTYPES[common],
        INDEX=tl.int32 if farthest < 2**30 else tl.int64,
        PRECISION=precision(r.new_empty(0, dtype=common), "bf16x6"),
        RETURN=precision(r.new_empty(0, dtype=dtype_of_returned(r, w)), "bf16x6"),
    )


def dtype_of_returned(r: Tensor, w: Tensor) -> torch.dtype:
    """The dtype that du and gu are kept in."""
    both = r.dtype == w.dtype == torch.bfloat16
    return torch.bfloat16 if both else accumulation_dtype(r.dtype, w.dtype)


def rows_of(x: Tensor) -> RoutedGradients:
    """Gradients [b, n, 3, H, d] with their strides."""
    return RoutedGradients(x, *x.stride())


def weight_of(x: Tensor) -> Weight:
    """A weight [3, H, d, D] with its strides."""
    return Weight(x, *x.stride())


def route(const: RoutedConstants, pairs: list[tuple[Tensor, Tensor]], u: Tensor) -> None:
    """The sum of r W over ``pairs`` (r, W), into ``u`` [b, n, H, D]."""
    (b, n), operands = u.shape[:2], []
    for r, w in pairs:
        operands += [rows_of(r), weight_of(w)]
    like = u if const.DTYPE == const.ACC else pairs[0][0]
    run_kernel(
        configs.ROUTE.plan(target_of(like, const.d)),
        routed_penalty_route_kernel,
        lambda c: const.H * cdiv(b * n, c["BLOCK_T"]) * cdiv(const.D, c["BLOCK_E"]),
        *(operands + [None, None])[:4],
        u,
        b * n,
        n,
        const=const,
    )


def route_back(const: RoutedConstants, pairs: list[tuple[Tensor, Tensor]], r: Tensor) -> None:
    """The sum of u Wᵀ over ``pairs`` (u, W), into ``r`` [b, n, 3, H, d]."""
    (b, n), operands = r.shape[:2], []
    for u, w in pairs:
        operands += [u, weight_of(w)]
    run_kernel(
        configs.ROUTE_BACK.plan(target_of(pairs[0][0], const.d)),
        routed_penalty_route_back_kernel,
        lambda c: const.H * cdiv(b * n, c["BLOCK_T"]) * cdiv(3 * const.d, c["BLOCK_J"]),
        *(operands + [None, None])[:4],
        rows_of(r),
        b * n,
        n,
        const=const,
    )


class WeightSums:
    """The sum of rᵀ u over tokens, tile after tile, in ``parts`` that programs share; added up in order at last."""

    def __init__(self, const: RoutedConstants, u: Tensor):
        self._const, self._plan = const, configs.WEIGHT.plan(target_of(u, const.d))
        blocks, tiles = self._blocks(self._plan.configuration), u.shape[0] * u.shape[1]
        tiles = cdiv(tiles, self._plan["BLOCK_T"])
        self._parts = 1
        while 2 * self._parts <= min(tiles, MOST_PARTS) and not fills(u, blocks * self._parts):
            self._parts *= 2
        self._shape = (self._parts, 3, const.H, const.d, const.D)
        self._sums: list[Tensor] = []  # before the next tile, and room for those after it

    def _blocks(self, c: Configuration) -> int:
        """Programs that cover the weight once."""
        const = self._const
        return const.H * cdiv(3 * const.d, c["BLOCK_J"]) * cdiv(const.D, c["BLOCK_E"])

    def add(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Add a tile's ``pairs`` (r, u). Never in place: a launch that is repeated gives the same."""
        u, operands = pairs[0][1], []
        b, n = u.shape[:2]
        for pair in pairs:
            operands += [rows_of(pair[0]), pair[1]]
        dtype = accumulation_dtype(u.dtype)
        room = self._sums.pop() if len(self._sums) == 2 else allocate(self._shape, dtype, u)
        before = self._sums[0] if self._sums else None
        run_kernel(
            self._plan,
            routed_penalty_weight_kernel,
            lambda c: self._parts * self._blocks(c),
            *(operands + [None, None])[:4],
            before,
            room,
            b * n,
            n,
            self._parts,
            const=self._const,
        )
        self._sums.insert(0, room)

    def total(self, like: Tensor) -> Tensor:
        """The sum ``[3, H, d, D]``, dense, in the dtype of ``like``."""
        total, sums = allocate(self._shape[1:], like.dtype, like), self._sums[0]
        sum_over_programs([sums, None], [total, None], self._parts, total.numel(), sums)
        return total
