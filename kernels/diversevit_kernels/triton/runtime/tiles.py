"""Device functions that every operator shares: tiles of rows x width, split into powers of two.

A *split tile* is a tuple of tiles [rows, w] whose widths ``w`` are ``WIDTHS`` (see ``sizes.split_width``):
head width 80 is three tiles of 32 and not a padded 128.
"""

import triton
import triton.language as tl

from .device import INTERPRETED

# INTERPRETED is a default, not a global that kernels read: Triton compares those at every launch.


@triton.jit
def as_number(x, ACC: tl.constexpr, INTERPRETED: tl.constexpr = INTERPRETED):
    """A float64 scalar argument in the accumulator's dtype (interpreted, it is a Python number)."""
    if INTERPRETED:
        return tl.full([], x, ACC)
    else:
        return x.to(ACC)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr = INTERPRETED):
    """acc + a b.

    The interpreter's product of bfloat16 tiles is wrong, and one of float32 depends on the tile's shape. So it
    multiplies in float64 and rounds once: as on a chip, an element is the same number in whatever tile it is made.
    """
    if INTERPRETED:
        a, b, wide = a.to(tl.float64), b.to(tl.float64), acc.to(tl.float64)
        return tl.dot(a, b, acc=wide, input_precision="ieee", out_dtype=tl.float64).to(acc.dtype)
    else:
        return tl.dot(a, b, acc=acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def load_split(
    ptr, stride_row, stride_col, rows, inside, WIDTH: tl.constexpr, WIDTHS: tl.constexpr
):
    """Rows ``rows`` of a [*, WIDTH] matrix as a split tile, zero outside."""
    tile = ()
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        cols = first + tl.arange(0, WIDTHS[i])
        at = rows[:, None] * stride_row + cols[None, :] * stride_col
        mask = inside[:, None] & (cols[None, :] < WIDTH)
        tile = tile + (tl.load(ptr + at, mask=mask, other=0.0),)
        first += WIDTHS[i]
    return tile


@triton.jit
def store_split(
    ptr, stride_row, stride_col, rows, inside, tile, WIDTH: tl.constexpr, WIDTHS: tl.constexpr
):
    """The inverse of ``load_split``, rounded to the dtype of ``ptr``."""
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        cols = first + tl.arange(0, WIDTHS[i])
        at = rows[:, None] * stride_row + cols[None, :] * stride_col
        value = tile[i].to(ptr.dtype.element_ty)
        tl.store(ptr + at, value, mask=inside[:, None] & (cols[None, :] < WIDTH))
        first += WIDTHS[i]


@triton.jit
def zeros_split(ROWS: tl.constexpr, WIDTHS: tl.constexpr, ACC: tl.constexpr):
    """A split tile of zeros."""
    tile = ()
    for i in tl.static_range(len(WIDTHS)):
        tile = tile + (tl.zeros([ROWS, WIDTHS[i]], ACC),)
    return tile


@triton.jit
def dot_nt(x, y, acc, PRECISION: tl.constexpr):
    """acc + x yᵀ of two split tiles: [M, K] and [N, K] -> [M, N]."""
    for i in tl.static_range(len(x)):
        acc = dot(x[i], tl.trans(y[i]), acc, PRECISION)
    return acc


@triton.jit
def add_dot(acc, p, y, PRECISION: tl.constexpr):
    """acc + p y of a tile [M, N] and split tiles [N, K]: -> split tile [M, K]. p is rounded to y's dtype."""
    total = ()
    for i in tl.static_range(len(y)):
        total = total + (dot(p.to(y[i].dtype), y[i], acc[i], PRECISION),)
    return total


@triton.jit
def scale_split(x, factor):
    """Each row of a split tile times its factor [M, 1], or a scalar."""
    scaled = ()
    for i in tl.static_range(len(x)):
        scaled = scaled + (x[i] * factor,)
    return scaled


@triton.jit
def subtract_split(x, y, factor):
    """x − factor ∘ y of split tiles, in x's dtype."""
    difference = ()
    for i in tl.static_range(len(x)):
        difference = difference + (x[i] - factor * y[i].to(x[i].dtype),)
    return difference
