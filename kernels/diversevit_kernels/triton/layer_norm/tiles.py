"""Device functions of the LayerNorm kernels: matrices of any strides, tiles of whole rows, means, the Jacobian.

Shapes   a tile is a split tile (see ``runtime/tiles.py``): some rows, and all WIDTH features in pieces
         [BLOCK_M, WIDTHS[i]], so that 768 features are three pieces of 256 and not a padded 1024. Statistics of its
         rows are [BLOCK_M, 1]; numbers per feature are pieces [1, WIDTHS[i]].
Padding  loads as zero, in both directions: means divide by WIDTH, and nothing outside is stored.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.copies import write
from ..runtime.strided import merged_axes, offsets
from ..runtime.tensors import allocate, check_operand
from ..runtime.tiles import scale_split

MAX_WIDTH = 8192
"""Features of a row that one tile holds."""


class Matrix(NamedTuple):
    """A matrix [rows, WIDTH] of any strides; in a kernel its ``ptr`` is a pointer."""

    ptr: Any
    strides: tuple[int, ...]  # of the merged axes that rows run through, innermost first
    col: int
    end: int = (
        1  # a constant after the strides: else Triton before 3.8 loses those of 1 behind a loop
    )


class Places(NamedTuple):
    """In a kernel: where a tile is."""

    row: Any  # [BLOCK_M]
    cols: Any  # of each piece, [WIDTHS[i]]
    inside: Any  # of each piece, [BLOCK_M, WIDTHS[i]]: which elements exist


@triton.constexpr_function
def rows_per_tile(TILE, WIDTHS):
    """Rows of a tile of at most TILE elements, a power of two."""
    return 1 << max(0, (TILE // sum(WIDTHS)).bit_length() - 1)


@triton.jit
def columns(WIDTHS: tl.constexpr):
    """The columns of each piece."""
    cols = ()
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        cols = cols + ((first + tl.arange(0, WIDTHS[i])).to(tl.int64),)
        first += WIDTHS[i]
    return cols


@triton.jit
def places(tile, rows, WIDTH: tl.constexpr, WIDTHS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The places of tile ``tile``."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    cols = columns(WIDTHS)
    inside = ()
    for i in tl.static_range(len(WIDTHS)):
        inside = inside + ((row < rows)[:, None] & (cols[i] < WIDTH)[None, :],)
    return Places(row, cols, inside)


@triton.jit
def load_tile(x, at, sizes, ACC: tl.constexpr):
    """Load a tile of a ``Matrix``, zero outside."""
    first = offsets(at.row, sizes, x.strides)[:, None]
    tile = ()
    for i in tl.static_range(len(at.cols)):
        ptr = x.ptr + (first + at.cols[i][None, :] * x.col)
        tile = tile + (tl.load(ptr, mask=at.inside[i], other=0.0).to(ACC),)
    return tile


@triton.jit
def store_tile(ptr, at, tile, WIDTH: tl.constexpr):
    """Store a tile of a dense [rows, WIDTH], rounded to the dtype of ``ptr``."""
    for i in tl.static_range(len(tile)):
        where = ptr + at.row[:, None] * WIDTH + at.cols[i][None, :]
        tl.store(where, tile[i].to(ptr.dtype.element_ty), mask=at.inside[i])


@triton.jit
def store_sums(ptr, program, tile, WIDTH: tl.constexpr, WIDTHS: tl.constexpr):
    """A tile summed over its rows, as row ``program`` of a dense [programs, WIDTH]; nothing of None."""
    if ptr is not None:
        cols = columns(WIDTHS)
        for i in tl.static_range(len(tile)):
            tl.store(ptr + program * WIDTH + cols[i], tl.sum(tile[i], 0), mask=cols[i] < WIDTH)


@triton.jit
def features(ptr, at, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Load numbers per feature, zero outside; None of None."""
    if ptr is None:
        return  # not "return None": Triton before 3.8 makes a tensor of it
    else:
        pieces = ()
        for i in tl.static_range(len(at.cols)):
            where = ptr + at.cols[i][None, :] + 0 * at.row[:, None]
            pieces = pieces + (tl.load(where, mask=at.inside[i], other=0.0).to(ACC),)
        return pieces


@triton.jit
def times(x, y):
    """x ∘ y of tiles; x where y is None."""
    if y is None:
        return x
    else:
        product = ()
        for i in tl.static_range(len(x)):
            product = product + (x[i] * y[i],)
        return product


@triton.jit
def plus(x, y):
    """x + y of tiles; x where y is None."""
    if y is None:
        return x
    else:
        total = ()
        for i in tl.static_range(len(x)):
            total = total + (x[i] + y[i],)
        return total


@triton.jit
def row_mean(z, WIDTH: tl.constexpr):
    """The mean of each row of ``z``, [BLOCK_M, 1]; ``z`` is zero beyond the row's end."""
    total = z[0]
    for i in tl.static_range(1, len(z)):
        total += z[i]
    return tl.sum(total, 1)[:, None] / WIDTH


@triton.jit
def centred(x, mean, at):
    """x − mean of each row, zero outside."""
    difference = ()
    for i in tl.static_range(len(x)):
        difference = difference + (tl.where(at.inside[i], x[i] - mean, 0.0),)
    return difference


@triton.jit
def load_normalized(x, mean_ptr, rstd_ptr, at, rows, sizes, ACC: tl.constexpr):
    """Load a tile of x normalized, xh of (11), and rstd of its rows [BLOCK_M, 1]; zero outside."""
    mean = tl.load(mean_ptr + at.row, mask=at.row < rows, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + at.row, mask=at.row < rows, other=0.0)[:, None]
    return scale_split(centred(load_tile(x, at, sizes, ACC), mean, at), rstd), rstd


@triton.jit
def jacobian(z, xh, rstd, along, WIDTH: tl.constexpr):
    """The Jacobian times z, J z of (13), given ``along`` = mean(xh ∘ z) and a z that is zero beyond the row's end."""
    mean = row_mean(z, WIDTH)
    product = ()
    for i in tl.static_range(len(z)):
        product = product + (rstd * (z[i] - mean - xh[i] * along),)
    return product


def sizes_of(x: Tensor, axes: int) -> tuple[int, int]:
    """The number of rows and of features of ``x``.

    Raises:
        NotImplementedError: a dtype, layout or width without a kernel.
    """
    check_operand("x", x)
    rows, width = math.prod(x.shape[: x.ndim - axes]), math.prod(x.shape[x.ndim - axes :])
    if width > MAX_WIDTH:
        raise NotImplementedError(
            f"layer_norm: Triton kernels normalize up to {MAX_WIDTH} features, not {width}"
        )
    return rows, width


def as_rows(axes: int, *tensors: Tensor | None) -> tuple[tuple[int, ...], list[Matrix | None]]:
    """Sizes of the axes that rows run through, merged for all tensors alike, and each one's strides."""
    whole = [(t, 0) if t is None else _with_one_column_stride(t, axes) for t in tensors]
    given = [t for t, _ in whole if t is not None]
    split = given[0].ndim - axes
    lead = [t.stride()[:split] for t in given]
    sizes, strides = merged_axes(given[0].shape[:split], *lead)
    each = iter(strides)
    return sizes, [None if t is None else Matrix(t, next(each), col) for t, col in whole]


def _with_one_column_stride(x: Tensor, axes: int) -> tuple[Tensor, int]:
    """``x``, or a dense copy if its normalized axes do not merge into one; the stride of that one."""
    split = x.ndim - axes
    inner, (strides,) = merged_axes(x.shape[split:], x.stride()[split:])
    if not inner:
        return x, strides[0]
    return write(allocate(tuple(x.shape), x.dtype, x), x), 1
