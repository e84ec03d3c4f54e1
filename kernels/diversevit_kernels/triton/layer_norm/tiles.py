"""Device functions of the LayerNorm kernels: matrices of any strides, tiles of whole rows, means, the Jacobian.

Shapes   a tile is [BLOCK_M, BLOCK_N]: some rows, and all WIDTH features padded to a power of two; statistics
         of its rows are [BLOCK_M, 1], numbers per feature [1, BLOCK_N].
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


@triton.constexpr_function
def rows_per_tile(TILE, BLOCK_N):
    """Rows of a tile of about TILE elements."""
    return max(1, TILE // BLOCK_N)


@triton.jit
def positions(tile, rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and columns of a tile, and which of its elements exist."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    col = tl.arange(0, BLOCK_N).to(tl.int64)
    return row, col, (row < rows)[:, None] & (col < WIDTH)[None, :]


@triton.jit
def load_tile(x, row, col, inside, sizes, ACC: tl.constexpr):
    """Load a tile of a ``Matrix``, zero outside."""
    at = offsets(row, sizes, x.strides)[:, None] + col[None, :] * x.col
    return tl.load(x.ptr + at, mask=inside, other=0.0).to(ACC)


@triton.jit
def store_tile(ptr, row, col, inside, tile, WIDTH: tl.constexpr):
    """Store a tile of a dense [rows, WIDTH], rounded to the dtype of ``ptr``."""
    at = row[:, None] * WIDTH + col[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def features(ptr, col, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Load numbers per feature as [1, BLOCK_N], zero outside; None of None."""
    if ptr is None:
        return  # not "return None": Triton before 3.8 makes a tensor of it
    else:
        return tl.load(ptr + col, mask=col < WIDTH, other=0.0).to(ACC)[None, :]


@triton.jit
def row_mean(z, WIDTH: tl.constexpr):
    """The mean of each row of ``z``, [BLOCK_M, 1]; ``z`` is zero beyond the row's end."""
    return tl.sum(z, 1)[:, None] / WIDTH


@triton.jit
def load_normalized(x, mean_ptr, rstd_ptr, row, col, inside, rows, sizes, ACC: tl.constexpr):
    """Load a tile of x normalized, xh of (11), and rstd of its rows [BLOCK_M, 1]; zero outside."""
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
    xh = (load_tile(x, row, col, inside, sizes, ACC) - mean) * rstd
    return tl.where(inside, xh, 0.0), rstd


@triton.jit
def jacobian(z, xh, rstd, WIDTH: tl.constexpr):
    """The Jacobian times z, J z of (13), given a z that is zero beyond the row's end."""
    return rstd * (z - row_mean(z, WIDTH) - xh * row_mean(xh * z, WIDTH))


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
