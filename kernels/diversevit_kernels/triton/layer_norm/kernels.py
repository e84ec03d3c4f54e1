"""LayerNorm on a GPU: forward, backward, double backward, equations (10)-(19) of kernels/README.md.

A program owns a tile of whole rows, so that one read serves every mean of a row. Gradients of the parameters are sums
over rows: see ``runtime/sums.py``.

Shapes   x, y, dy, ddx, dx, gx, gdy [*lead, *normalized], ``axes`` normalized axes; weight, bias, their
         gradients and cotangents [*normalized]; mean, rstd [*lead]. In a kernel [rows, WIDTH], [WIDTH], [rows].
         x, dy and ddx have any strides; they are copied only if their normalized axes do not merge into one.
Dtypes   float16, bfloat16, float32, float64; a half x may have float32 parameters. Statistics, means and sums
         in float32 (float64 for float64).
Traffic  each of x, dy, ddx that a kernel takes is read once, each result like x written once; also 2 numbers
         per row, and the partial sums of ``runtime/sums.py`` for each gradient of a parameter.
Source   one tile per row: Triton's layer-norm tutorial; (15)-(19) are derived in the README.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ...common.contracts import LayerNormBackward, LayerNormDoubleBackward
from ...common.dtypes import accumulation_dtype
from ..runtime.copies import dense, write
from ..runtime.device import accumulator, multiprocessors
from ..runtime.launch import run_kernel
from ..runtime.plan import Plan, target_of
from ..runtime.sizes import cdiv, split_width
from ..runtime.sums import sum_over_programs
from ..runtime.tensors import allocate
from ..runtime.tiles import scale_split, zeros_split
from . import configs
from .tiles import (
    as_rows,
    centred,
    features,
    jacobian,
    load_normalized,
    load_tile,
    places,
    plus,
    row_mean,
    rows_per_tile,
    sizes_of,
    store_sums,
    store_tile,
    times,
)


@triton.jit
def layer_norm_forward_kernel(
    x,  # Matrix [rows, WIDTH]
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
    WIDTHS: tl.constexpr,  # of the pieces of a row
    TILE: tl.constexpr,
):
    """Forward, (10)-(12). One program owns the rows of one tile.

    The mean of x - mean, which rounding left over, corrects the mean: a constant row has xh = 0.
    """
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, WIDTHS)
    tile = tl.program_id(0).to(tl.int64)
    at = places(tile, rows, WIDTH, WIDTHS, BLOCK_M)
    x_tile = load_tile(x, at, sizes, ACC)
    rough = row_mean(x_tile, WIDTH)
    mean = rough + row_mean(centred(x_tile, rough, at), WIDTH)
    deviation = centred(x_tile, mean, at)
    rstd = tl.rsqrt(row_mean(times(deviation, deviation), WIDTH) + EPS)
    y = times(scale_split(deviation, rstd), features(weight_ptr, at, WIDTH, ACC))
    store_tile(y_ptr, at, plus(y, features(bias_ptr, at, WIDTH, ACC)), WIDTH)
    row = at.row[:, None]
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def layer_norm_backward_kernel(
    x,  # Matrix [rows, WIDTH]
    dy,  # Matrix [rows, WIDTH]
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
    WIDTHS: tl.constexpr,  # of the pieces of a row
    TILE: tl.constexpr,
):
    """Backward, (14). One of P programs owns every P-th tile of rows, and their part of dw and db."""
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, WIDTHS)
    program = tl.program_id(0).to(tl.int64)
    dw, db = zeros_split(BLOCK_M, WIDTHS, ACC), zeros_split(BLOCK_M, WIDTHS, ACC)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        at = places(tile, rows, WIDTH, WIDTHS, BLOCK_M)
        xh, rstd = load_normalized(x, mean_ptr, rstd_ptr, at, rows, sizes, ACC)
        dy_tile = load_tile(dy, at, sizes, ACC)
        if dw_ptr is not None:
            dw = plus(dw, times(dy_tile, xh))
        if db_ptr is not None:
            db = plus(db, dy_tile)
        dxh = times(dy_tile, features(weight_ptr, at, WIDTH, ACC))
        dx = jacobian(dxh, xh, rstd, row_mean(times(xh, dxh), WIDTH), WIDTH)
        store_tile(dx_ptr, at, dx, WIDTH)
    store_sums(dw_ptr, program, dw, WIDTH, WIDTHS)
    store_sums(db_ptr, program, db, WIDTH, WIDTHS)


@triton.jit
def layer_norm_double_backward_kernel(
    x,  # Matrix [rows, WIDTH]
    dy,  # Matrix [rows, WIDTH]
    ddx,  # Matrix [rows, WIDTH], or None
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
    WIDTHS: tl.constexpr,  # of the pieces of a row
    TILE: tl.constexpr,
):
    """Double backward, (15)-(19). One of P programs owns every P-th tile of rows, and their part of gw.

    Two rounds of row means: mean(ddx), alpha1 and alpha2, then alpha3 and the two of J gxh.
    """
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, WIDTHS)
    program = tl.program_id(0).to(tl.int64)
    gw = zeros_split(BLOCK_M, WIDTHS, ACC)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        at = places(tile, rows, WIDTH, WIDTHS, BLOCK_M)
        xh, rstd = load_normalized(x, mean_ptr, rstd_ptr, at, rows, sizes, ACC)
        w = features(weight_ptr, at, WIDTH, ACC)
        dy_tile = load_tile(dy, at, sizes, ACC)
        gxh, gdy = zeros_split(BLOCK_M, WIDTHS, ACC), zeros_split(BLOCK_M, WIDTHS, ACC)
        alpha3 = tl.zeros([BLOCK_M, 1], ACC)
        if ddx is not None:
            ddx_tile, dxh = load_tile(ddx, at, sizes, ACC), times(dy_tile, w)
            alpha1 = row_mean(times(ddx_tile, xh), WIDTH)
            alpha2 = row_mean(times(dxh, xh), WIDTH)
            ddxh = jacobian(ddx_tile, xh, rstd, alpha1, WIDTH)
            alpha3 = row_mean(times(dxh, ddxh), WIDTH)
            gxh = plus(scale_split(ddx_tile, -rstd * alpha2), scale_split(dxh, -rstd * alpha1))
            gdy = times(ddxh, w)
            if gw_ptr is not None:
                gw = plus(gw, times(dy_tile, ddxh))
        if ddw_ptr is not None:
            ddw = features(ddw_ptr, at, WIDTH, ACC)
            gxh = plus(gxh, times(dy_tile, ddw))
            gdy = plus(gdy, times(xh, ddw))
        store_tile(gdy_ptr, at, plus(gdy, features(ddb_ptr, at, WIDTH, ACC)), WIDTH)
        # J gxh and the last term of (18), both along xh
        along = row_mean(times(xh, gxh), WIDTH) + alpha3
        store_tile(gx_ptr, at, jacobian(gxh, xh, rstd, along, WIDTH), WIDTH)
    store_sums(gw_ptr, program, gw, WIDTH, WIDTHS)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm, (10)-(12): ``y`` like x, ``mean`` and ``rstd`` [*lead]."""
    rows, width = sizes_of(x, axes)
    lead, dtype = tuple(x.shape[: x.ndim - axes]), accumulation_dtype(x.dtype)
    y = allocate(tuple(x.shape), x.dtype, x)
    mean, rstd = (allocate(lead, dtype, x) for _ in range(2))
    if x.numel() == 0:
        return y, write(mean, math.nan), write(rstd, math.nan)  # of no features, as the definition
    sizes, (x_rows,) = as_rows(axes, x)
    widths = split_width(width)
    run_kernel(
        configs.FORWARD.plan(target_of(x, width)),
        layer_norm_forward_kernel,
        lambda c: cdiv(rows, rows_per_tile(c["TILE"], widths)),
        x_rows,
        *map(dense, (weight, bias)),
        y,
        mean,
        rstd,
        sizes,
        rows,
        WIDTH=width,
        EPS=eps,
        ACC=accumulator(x.dtype),
        WIDTHS=widths,
    )
    return y, mean, rstd


def layer_norm_backward(inputs: LayerNormBackward) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the inputs, (14): ``dx`` like x, ``dw`` if ``weight_grad``, ``db`` if ``bias_grad``."""
    x, weight, mean, rstd, dy, axes, weight_grad, bias_grad = inputs
    rows, width = sizes_of(x, axes)
    like = x if weight is None else weight
    normalized = tuple(x.shape[x.ndim - axes :])
    dx = allocate(tuple(x.shape), x.dtype, x)
    dw, db = (
        allocate(normalized, like.dtype, x) if asked else None for asked in (weight_grad, bias_grad)
    )
    if x.numel() == 0:
        dw, db = (None if g is None else write(g, 0.0) for g in (dw, db))
        return dx, dw, db
    sizes, (x_rows, dy_rows) = as_rows(axes, x, dy)
    plan = configs.BACKWARD.plan(target_of(x, width))
    programs = _programs(plan, x, rows, width)
    parts = [None if g is None else allocate((programs, width), mean.dtype, x) for g in (dw, db)]
    run_kernel(
        plan,
        layer_norm_backward_kernel,
        lambda _: programs,
        x_rows,
        dy_rows,
        *map(dense, (weight, mean, rstd)),
        dx,
        *parts,
        sizes,
        rows,
        WIDTH=width,
        ACC=accumulator(x.dtype),
        WIDTHS=split_width(width),
    )
    sum_over_programs(parts, [dw, db], programs, width, x)
    return dx, dw, db


def layer_norm_double_backward(
    inputs: LayerNormDoubleBackward,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of the backward's inputs, (15)-(19): ``gx`` like x, ``gw`` if ``weight_grad``, ``gdy`` like dy.

    An absent cotangent costs nothing. ``gx`` is None unless ``ddx`` or ``ddw`` is given,
    ``gw`` unless ``ddx`` is.
    """
    x, weight, mean, rstd, dy, ddx, ddw, ddb, axes, weight_grad = inputs
    rows, width = sizes_of(x, axes)
    gdy = allocate(tuple(x.shape), x.dtype, x)
    if ddx is None and ddw is None:
        return None, None, write(gdy, 0.0 if ddb is None else ddb)
    gx = allocate(tuple(x.shape), x.dtype, x)
    gw = None
    if weight is not None and ddx is not None and weight_grad:
        gw = allocate(tuple(weight.shape), weight.dtype, x)
    if x.numel() == 0:
        return gx, None if gw is None else write(gw, 0.0), gdy
    sizes, reads = as_rows(axes, x, dy, ddx)
    plan = configs.DOUBLE_BACKWARD.plan(target_of(x, width))
    programs = _programs(plan, x, rows, width)
    parts = None if gw is None else allocate((programs, width), mean.dtype, x)
    run_kernel(
        plan,
        layer_norm_double_backward_kernel,
        lambda _: programs,
        *reads,
        *map(dense, (weight, ddw, ddb, mean, rstd)),
        gx,
        gdy,
        parts,
        sizes,
        rows,
        WIDTH=width,
        ACC=accumulator(x.dtype),
        WIDTHS=split_width(width),
    )
    sum_over_programs([parts, None], [gw, None], programs, width, x)
    return gx, gw, gdy


def _programs(plan: Plan, x: Tensor, rows: int, width: int) -> int:
    """Programs that share the rows of a backward pass: a tile for each, up to two per multiprocessor.

    Kernels stride by the grid they find, so this is right for tiles of any size: autotuning tries several.
    """
    most = 2 * (multiprocessors(x) or 128)
    return min(most, cdiv(rows, rows_per_tile(plan["TILE"], split_width(width))))
