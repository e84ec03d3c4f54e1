"""LayerNorm on a GPU: forward, backward, double backward, equations (10)-(19) of kernels/README.md.

A program owns a tile of whole rows, padded to a power of two of features, so that one read serves every
mean of a row. Gradients of the parameters are sums over rows: see ``runtime/sums.py``.

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
from ..runtime.sizes import cdiv, power_of_two
from ..runtime.sums import store_sums, sum_over_programs
from ..runtime.tensors import allocate
from . import configs
from .tiles import (
    as_rows,
    features,
    jacobian,
    load_normalized,
    load_tile,
    positions,
    row_mean,
    rows_per_tile,
    sizes_of,
    store_tile,
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
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Forward, (10)-(12). One program owns the rows of one tile.

    The mean of x - mean, which rounding left over, corrects the mean: a constant row has xh = 0.
    """
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, BLOCK_N)
    tile = tl.program_id(0).to(tl.int64)
    row, col, inside = positions(tile, rows, WIDTH, BLOCK_M, BLOCK_N)
    x_tile = load_tile(x, row, col, inside, sizes, ACC)
    rough = row_mean(x_tile, WIDTH)
    mean = rough + row_mean(tl.where(inside, x_tile - rough, 0.0), WIDTH)
    centred = tl.where(inside, x_tile - mean, 0.0)
    rstd = tl.rsqrt(row_mean(centred * centred, WIDTH) + EPS)
    y = centred * rstd
    if weight_ptr is not None:
        y = y * features(weight_ptr, col, WIDTH, ACC)
    if bias_ptr is not None:
        y = y + features(bias_ptr, col, WIDTH, ACC)
    store_tile(y_ptr, row, col, inside, y, WIDTH)
    tl.store(mean_ptr + row[:, None], mean, mask=row[:, None] < rows)
    tl.store(rstd_ptr + row[:, None], rstd, mask=row[:, None] < rows)


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
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Backward, (14). One of P programs owns every P-th tile of rows, and their part of dw and db."""
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    dw, db = tl.zeros([BLOCK_M, BLOCK_N], ACC), tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row, col, inside = positions(tile, rows, WIDTH, BLOCK_M, BLOCK_N)
        xh, rstd = load_normalized(x, mean_ptr, rstd_ptr, row, col, inside, rows, sizes, ACC)
        dxh = load_tile(dy, row, col, inside, sizes, ACC)
        if dw_ptr is not None:
            dw += dxh * xh
        if db_ptr is not None:
            db += dxh
        if weight_ptr is not None:
            dxh = dxh * features(weight_ptr, col, WIDTH, ACC)
        store_tile(dx_ptr, row, col, inside, jacobian(dxh, xh, rstd, WIDTH), WIDTH)
    store_sums(dw_ptr, program, dw, WIDTH)
    store_sums(db_ptr, program, db, WIDTH)


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
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Double backward, (15)-(19). One of P programs owns every P-th tile of rows, and their part of gw.

    Two rounds of row means: mean(ddx), alpha1 and alpha2, then alpha3 and the two of J gxh.
    """
    BLOCK_M: tl.constexpr = rows_per_tile(TILE, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    gw = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row, col, inside = positions(tile, rows, WIDTH, BLOCK_M, BLOCK_N)
        xh, rstd = load_normalized(x, mean_ptr, rstd_ptr, row, col, inside, rows, sizes, ACC)
        w = features(weight_ptr, col, WIDTH, ACC)
        dy_tile = load_tile(dy, row, col, inside, sizes, ACC)
        gxh, gdy = tl.zeros([BLOCK_M, BLOCK_N], ACC), tl.zeros([BLOCK_M, BLOCK_N], ACC)
        alpha3 = tl.zeros([BLOCK_M, 1], ACC)
        if ddx is not None:
            ddx_tile = load_tile(ddx, row, col, inside, sizes, ACC)
            dxh = dy_tile if w is None else dy_tile * w
            alpha1, alpha2 = row_mean(ddx_tile * xh, WIDTH), row_mean(dxh * xh, WIDTH)
            ddxh = rstd * (ddx_tile - row_mean(ddx_tile, WIDTH) - xh * alpha1)
            alpha3 = row_mean(dxh * ddxh, WIDTH)
            gxh = -rstd * (alpha2 * ddx_tile + alpha1 * dxh)
            gdy = ddxh if w is None else ddxh * w
            if gw_ptr is not None:
                gw += dy_tile * ddxh
        if ddw_ptr is not None:
            ddw = features(ddw_ptr, col, WIDTH, ACC)
            gxh += dy_tile * ddw
            gdy += xh * ddw
        if ddb_ptr is not None:
            gdy += features(ddb_ptr, col, WIDTH, ACC)
        store_tile(gdy_ptr, row, col, inside, gdy, WIDTH)
        gx = jacobian(gxh, xh, rstd, WIDTH) - rstd * alpha3 * xh
        store_tile(gx_ptr, row, col, inside, gx, WIDTH)
    store_sums(gw_ptr, program, gw, WIDTH)


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
    block = power_of_two(width)
    run_kernel(
        configs.FORWARD.plan(target_of(x, width)),
        layer_norm_forward_kernel,
        lambda c: cdiv(rows, rows_per_tile(c["TILE"], block)),
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
        BLOCK_N=block,
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
        BLOCK_N=power_of_two(width),
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
        BLOCK_N=power_of_two(width),
    )
    sum_over_programs([parts, None], [gw, None], programs, width, x)
    return gx, gw, gdy


def _programs(plan: Plan, x: Tensor, rows: int, width: int) -> int:
    """Programs that share the rows of a backward pass: a tile for each, up to two per multiprocessor.

    Kernels stride by the grid they find, so this is right for tiles of any size: autotuning tries several.
    """
    most = 2 * (multiprocessors(x) or 128)
    return min(most, cdiv(rows, rows_per_tile(plan["TILE"], power_of_two(width))))
