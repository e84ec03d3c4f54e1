"""LayerNorm on a GPU: forward, backward, double backward, equations (10)-(19) of kernels/README.md.

A program owns a tile of whole rows, padded to a power of two of features, so that one read serves every
mean of a row. Gradients of the parameters are sums over rows, in two stages without atomics: each of a
fixed number of programs walks its tiles in order and writes its own sums, which a second kernel adds in
order: same bits on every run.

Shapes   x, y, dy, ddx, dx, gx, gdy [*lead, *normalized], ``axes`` normalized axes; weight, bias, their
         gradients and cotangents [*normalized]; mean, rstd [*lead]. In a kernel [rows, WIDTH], [WIDTH], [rows].
         x, dy and ddx have any strides; they are copied only if their normalized axes do not merge into one.
Dtypes   float16, bfloat16, float32, float64; a half x may have float32 parameters. Statistics, means and sums
         in float32 (float64 for float64).
Traffic  each of x, dy, ddx that a rung takes is read once, each result like x written once; besides 2 numbers
         per row, and 2 x PROGRAMS x WIDTH (forward: none) for each gradient of a parameter.
Source   two-stage sums: Triton's layer-norm tutorial and Liger's layer_norm.py; (15)-(19) derived in the README.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configurations import accumulator, configuration
from .launch import allocate, cdiv, check_operand, launch, power_of_two
from .strided import merged_axes, offsets

MAX_WIDTH = 8192
"""Features of a row that one tile holds."""


class Rows(NamedTuple):
    """A matrix [rows, WIDTH] of any strides; in a kernel its ``ptr`` is a pointer."""

    ptr: Any
    strides: tuple[int, ...]  # of the merged axes that rows run through, innermost first
    col: int


@triton.constexpr_function
def rows_per_tile(TILE, BLOCK_N):
    """Rows of a tile of about TILE elements."""
    return max(1, TILE // BLOCK_N)


@triton.jit
def _positions(tile, rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of a tile, and which of its elements exist."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    col = tl.arange(0, BLOCK_N).to(tl.int64)
    return row, col, (row < rows)[:, None] & (col < WIDTH)[None, :]


@triton.jit
def _load(x, row, col, inside, sizes, ACC: tl.constexpr):
    """A tile of ``Rows``, zero outside."""
    at = offsets(row, sizes, x.strides)[:, None] + col[None, :] * x.col
    return tl.load(x.ptr + at, mask=inside, other=0.0).to(ACC)


@triton.jit
def _store(ptr, row, col, inside, tile, WIDTH: tl.constexpr):
    """A tile of a dense [rows, WIDTH], rounded to the dtype of ``ptr``."""
    at = row[:, None] * WIDTH + col[None, :]
    tl.store(ptr + at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _features(ptr, col, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """[1, BLOCK_N] numbers per feature, zero outside; None of None."""
    if ptr is None:
        return None
    else:
        return tl.load(ptr + col, mask=col < WIDTH, other=0.0).to(ACC)[None, :]


@triton.jit
def _mean(z, WIDTH: tl.constexpr):
    """Of every row, [BLOCK_M, 1]; ``z`` is zero beyond the row's end."""
    return tl.sum(z, 1)[:, None] / WIDTH


@triton.jit
def _statistics(mean_ptr, rstd_ptr, row, rows):
    """mean and rstd of a tile's rows, [BLOCK_M, 1], zero outside: there xh and J are zero too."""
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    return mean[:, None], rstd[:, None]


@triton.jit
def _jacobian(z, xh, rstd, WIDTH: tl.constexpr):
    """(13): J z, given a z that is zero beyond the row's end."""
    return rstd * (z - _mean(z, WIDTH) - xh * _mean(xh * z, WIDTH))


@triton.jit
def _forward_kernel(
    x,  # Rows [rows, WIDTH]
    weight_ptr,  # [WIDTH], or None
    bias_ptr,  # [WIDTH], or None
    y_ptr,  # [rows, WIDTH], dense
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    sizes,  # of the merged axes that rows run through
    rows,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """(10)-(12). One program owns the rows of one tile.

    The mean of x - mean, which rounding left over, corrects the mean: a constant row has xh = 0.
    """
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, BLOCK_N)
    tile = tl.program_id(0).to(tl.int64)
    row, col, inside = _positions(tile, rows, WIDTH, BLOCK_M, BLOCK_N)
    x_tile = _load(x, row, col, inside, sizes, ACC)
    rough = _mean(x_tile, WIDTH)
    centred = tl.where(inside, x_tile - rough, 0.0)
    left = _mean(centred, WIDTH)
    mean = rough + left
    variance = _mean(centred * centred, WIDTH) - left * left
    rstd = tl.rsqrt(variance + EPS)
    y = (x_tile - mean) * rstd
    if weight_ptr is not None:
        y = y * _features(weight_ptr, col, WIDTH, ACC)
    if bias_ptr is not None:
        y = y + _features(bias_ptr, col, WIDTH, ACC)
    _store(y_ptr, row, col, inside, y, WIDTH)
    tl.store(mean_ptr + row[:, None], mean, mask=row[:, None] < rows)
    tl.store(rstd_ptr + row[:, None], rstd, mask=row[:, None] < rows)


@triton.jit
def _backward_kernel(
    x,  # Rows [rows, WIDTH]
    dy,  # Rows [rows, WIDTH]
    weight_ptr,  # [WIDTH], or None
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    dx_ptr,  # [rows, WIDTH], dense
    dw_ptr,  # [programs, WIDTH], dense: sums over each program's rows; or None
    db_ptr,  # [programs, WIDTH], dense: sums over each program's rows; or None
    sizes,  # of the merged axes that rows run through
    rows,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """(14). One program owns every PROGRAMS-th tile of rows, and their part of dw and db."""
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    dw, db = tl.zeros([BLOCK_M, BLOCK_N], ACC), tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), PROGRAMS):
        row, col, inside = _positions(tile, rows, WIDTH, BLOCK_M, BLOCK_N)
        mean, rstd = _statistics(mean_ptr, rstd_ptr, row, rows)
        xh = (_load(x, row, col, inside, sizes, ACC) - mean) * rstd
        g = _load(dy, row, col, inside, sizes, ACC)
        if dw_ptr is not None:
            dw += g * xh
        if db_ptr is not None:
            db += g
        if weight_ptr is not None:
            g = g * _features(weight_ptr, col, WIDTH, ACC)
        _store(dx_ptr, row, col, inside, _jacobian(g, xh, rstd, WIDTH), WIDTH)
    _store_sums(dw_ptr, program, dw, WIDTH)
    _store_sums(db_ptr, program, db, WIDTH)


@triton.jit
def _store_sums(ptr, program, tile, WIDTH: tl.constexpr):
    """A tile summed over its rows, as row ``program`` of [programs, WIDTH]; nothing of None."""
    if ptr is not None:
        col = tl.arange(0, tile.shape[1])
        tl.store(ptr + program * WIDTH + col, tl.sum(tile, 0), mask=col < WIDTH)


@triton.jit
def _double_backward_kernel(
    x,  # Rows [rows, WIDTH]
    dy,  # Rows [rows, WIDTH]
    ddx,  # Rows [rows, WIDTH]: a; or None
    weight_ptr,  # [WIDTH], or None
    ddw_ptr,  # [WIDTH], or None
    ddb_ptr,  # [WIDTH], or None
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    gx_ptr,  # [rows, WIDTH], dense
    gdy_ptr,  # [rows, WIDTH], dense
    gw_ptr,  # [programs, WIDTH], dense: sums over each program's rows; or None
    sizes,  # of the merged axes that rows run through
    rows,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """(15)-(19). One program owns every PROGRAMS-th tile of rows, and their part of gw.

    Two rounds of row means: mean(a), a2 and c2, then q and the two of J h.
    """
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    gw = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), PROGRAMS):
        row, col, inside = _positions(tile, rows, WIDTH, BLOCK_M, BLOCK_N)
        mean, rstd = _statistics(mean_ptr, rstd_ptr, row, rows)
        w = _features(weight_ptr, col, WIDTH, ACC)
        xh = (_load(x, row, col, inside, sizes, ACC) - mean) * rstd
        dy_tile = _load(dy, row, col, inside, sizes, ACC)
        h, gdy = tl.zeros([BLOCK_M, BLOCK_N], ACC), tl.zeros([BLOCK_M, BLOCK_N], ACC)
        q = tl.zeros([BLOCK_M, 1], ACC)
        if ddx is not None:
            a = _load(ddx, row, col, inside, sizes, ACC)
            g = dy_tile if w is None else dy_tile * w
            a2, c2 = _mean(a * xh, WIDTH), _mean(g * xh, WIDTH)
            s = rstd * (a - _mean(a, WIDTH) - xh * a2)
            q = _mean(g * s, WIDTH)
            h = -rstd * (c2 * a + a2 * g)
            gdy = s if w is None else s * w
            if gw_ptr is not None:
                gw += dy_tile * s
        if ddw_ptr is not None:
            ddw = _features(ddw_ptr, col, WIDTH, ACC)
            h += dy_tile * ddw
            gdy += xh * ddw
        if ddb_ptr is not None:
            gdy += _features(ddb_ptr, col, WIDTH, ACC)
        _store(gdy_ptr, row, col, inside, gdy, WIDTH)
        gx = _jacobian(h, xh, rstd, WIDTH) - rstd * q * xh
        _store(gx_ptr, row, col, inside, gx, WIDTH)
    _store_sums(gw_ptr, program, gw, WIDTH)


@triton.jit
def _sums_kernel(
    one_ptr,  # [parts, WIDTH], dense, or None
    two_ptr,  # [parts, WIDTH], dense, or None
    one_sum_ptr,  # [WIDTH], or None like one_ptr
    two_sum_ptr,  # [WIDTH], or None like two_ptr
    parts,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums over rows in (14) and (19), from their parts. One program owns BLOCK_N features."""
    col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    _sum_parts(one_ptr, one_sum_ptr, col, parts, WIDTH, ACC, BLOCK_P)
    _sum_parts(two_ptr, two_sum_ptr, col, parts, WIDTH, ACC, BLOCK_P)


@triton.jit
def _sum_parts(
    ptr, sum_ptr, col, parts, WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The columns ``col`` of [parts, WIDTH] summed, and rounded; nothing of None."""
    if ptr is not None:
        total = tl.zeros([BLOCK_P, col.shape[0]], ACC)
        for first in range(0, parts, BLOCK_P):
            part = first + tl.arange(0, BLOCK_P)
            inside = (part < parts)[:, None] & (col < WIDTH)[None, :]
            total += tl.load(ptr + part[:, None] * WIDTH + col[None, :], mask=inside, other=0.0)
        value = tl.sum(total, 0).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + col, value, mask=col < WIDTH)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12): ``y`` like x, ``mean`` and ``rstd`` [*lead]."""
    rows, width = _sizes(x, axes)
    lead, dtype = tuple(x.shape[: x.ndim - axes]), torch.promote_types(x.dtype, torch.float32)
    y = allocate(tuple(x.shape), x.dtype, x)
    mean, rstd = (allocate(lead, dtype, x) for _ in range(2))
    if x.numel() == 0:
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)  # of no features, as the definition
    sizes, (x_rows,) = _as_rows(axes, x)
    block = power_of_two(width)
    launch(
        "layer_norm_forward",
        _forward_kernel,
        lambda c: cdiv(rows, rows_per_tile(c["TILE"], block)),
        x,
        width,
        x_rows,
        *map(_flat, (weight, bias)),
        y,
        mean,
        rstd,
        sizes,
        rows,
        WIDTH=width,
        EPS=eps,
        ACC=accumulator(x.dtype),
        BLOCK_N=block,
    )
    return y, mean, rstd


def layer_norm_backward(
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    axes: int,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(14): ``dx`` like x, ``dw`` if ``weight_grad``, ``db`` if ``bias_grad``."""
    rows, width = _sizes(x, axes)
    like = x if weight is None else weight
    normalized = tuple(x.shape[x.ndim - axes :])
    dx = allocate(tuple(x.shape), x.dtype, x)
    dw, db = (
        allocate(normalized, like.dtype, x) if asked else None for asked in (weight_grad, bias_grad)
    )
    if x.numel() == 0:
        return dx, *(None if g is None else g.zero_() for g in (dw, db))
    sizes, (x_rows, dy_rows) = _as_rows(axes, x, dy)
    programs = _programs("layer_norm_backward", x, rows, width)
    parts = [None if g is None else allocate((programs, width), mean.dtype, x) for g in (dw, db)]
    launch(
        "layer_norm_backward",
        _backward_kernel,
        lambda _: programs,
        x,
        width,
        x_rows,
        dy_rows,
        *map(_flat, (weight, mean, rstd)),
        dx,
        *parts,
        sizes,
        rows,
        WIDTH=width,
        ACC=accumulator(x.dtype),
        BLOCK_N=power_of_two(width),
    )
    _sum_over_programs(parts, [dw, db], programs, width, x)
    return dx, dw, db


def layer_norm_double_backward(
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    ddx: Tensor | None,
    ddw: Tensor | None,
    ddb: Tensor | None,
    axes: int,
    weight_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(15)-(19): ``gx`` like x, ``gw`` if ``weight_grad``, ``gdy`` like dy.

    An absent cotangent costs nothing. ``gx`` is None unless ``ddx`` or ``ddw`` is given,
    ``gw`` unless ``ddx`` is.
    """
    rows, width = _sizes(x, axes)
    gdy = allocate(tuple(x.shape), x.dtype, x)
    if ddx is None and ddw is None:
        return None, None, gdy.zero_() if ddb is None else gdy.copy_(ddb)
    gx = allocate(tuple(x.shape), x.dtype, x)
    gw = None
    if weight is not None and ddx is not None and weight_grad:
        gw = allocate(tuple(weight.shape), weight.dtype, x)
    if x.numel() == 0:
        return gx, None if gw is None else gw.zero_(), gdy
    sizes, reads = _as_rows(axes, x, dy, ddx)
    programs = _programs("layer_norm_double_backward", x, rows, width)
    parts = None if gw is None else allocate((programs, width), mean.dtype, x)
    launch(
        "layer_norm_double_backward",
        _double_backward_kernel,
        lambda _: programs,
        x,
        width,
        *reads,
        *map(_flat, (weight, ddw, ddb, mean, rstd)),
        gx,
        gdy,
        parts,
        sizes,
        rows,
        WIDTH=width,
        ACC=accumulator(x.dtype),
        BLOCK_N=power_of_two(width),
    )
    _sum_over_programs([parts, None], [gw, None], programs, width, x)
    return gx, gw, gdy


def _sizes(x: Tensor, axes: int) -> tuple[int, int]:
    """Rows and features of ``x``.

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


def _as_rows(axes: int, *tensors: Tensor | None) -> tuple[tuple[int, ...], list[Rows | None]]:
    """Sizes of the axes that rows run through, merged for all tensors alike, and each one's strides."""
    whole = [(t, 0) if t is None else _with_one_column_stride(t, axes) for t in tensors]
    given = [t for t, _ in whole if t is not None]
    split = given[0].ndim - axes
    lead = [t.stride()[:split] for t in given]
    sizes, strides = merged_axes(given[0].shape[:split], *lead)
    each = iter(strides)
    return sizes, [None if t is None else Rows(t, next(each), col) for t, col in whole]


def _with_one_column_stride(x: Tensor, axes: int) -> tuple[Tensor, int]:
    """``x``, or a dense copy if its normalized axes do not merge into one; the stride of that one."""
    split = x.ndim - axes
    inner, (strides,) = merged_axes(x.shape[split:], x.stride()[split:])
    return (x.contiguous(), 1) if inner else (x, strides[0])


def _flat(x: Tensor | None) -> Tensor | None:
    """Dense: numbers per feature, or per row."""
    return None if x is None else x.contiguous()


def _programs(name: str, x: Tensor, rows: int, width: int) -> int:
    """Programs that share the rows of a backward pass: a tile for each, up to the table's number."""
    chosen = configuration(name, x, width)
    tiles = cdiv(rows, rows_per_tile(chosen["TILE"], power_of_two(width)))
    return min(chosen["PROGRAMS"], tiles)


def _sum_over_programs(
    parts: list[Tensor | None], sums: list[Tensor | None], programs: int, width: int, x: Tensor
) -> None:
    """Add what the programs summed; starts nothing if no parameter wants a gradient."""
    if all(s is None for s in sums):
        return
    launch(
        "layer_norm_sums",
        _sums_kernel,
        lambda c: cdiv(width, c["BLOCK_N"]),
        x,
        width,
        *parts,
        *sums,
        programs,
        WIDTH=width,
        ACC=accumulator(x.dtype),
    )
