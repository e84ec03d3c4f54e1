"""LayerNorm on a CPU: forward, backward, double backward, equations (10)-(19) of kernels/README.md.

In float32 and bfloat16 a rung is one C++ kernel (``layer_norm_native``). In other dtypes, or where there is no
compiler, forward and backward are PyTorch's own fused kernels, made to keep statistics and sums in the accumulation
dtype (for half types they would not); the backward of half types and the double backward own one chunk of rows at a
time, whose buffers are reused and stay in the cache, and the Jacobian (13) is PyTorch's fused backward; sums over rows
run chunk by chunk in order. Same bits on every run with the same number of threads.

Shapes   x, y, dy [*lead, *normalized], ``axes`` normalized axes; weight, bias [*normalized];
         mean, rstd [*lead]. Inside the double backward [rows, width] and [width].
Dtypes   any floating; a half x may have float32 parameters. Statistics, means and sums in float32
         (float64 for float64).
Traffic  the double backward reads x, dy, ddx and writes gx, gdy once each.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ..runtime.allocator import new_empty
from ..runtime.scratch import Scratch
from . import native

CHUNK_ELEMENTS = 1 << 17
"""Elements of a chunk per thread (512 KiB in float32): the fastest of 2^14 ... 2^19.

Measured at 32 x 197 x 384; smaller chunks lose more to the cost of a call than caches gain them."""


def _flat(x: Tensor, axes: int) -> Tensor:
    """``x`` as ``[rows, width]``; a view if its strides allow."""
    split = x.ndim - axes
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12): ``y`` like x, ``mean`` and ``rstd`` [*lead]."""
    if native.runs(x):
        return native.forward(x, weight, bias, axes, eps)
    lead, normalized = x.shape[: x.ndim - axes], x.shape[x.ndim - axes :]
    dtype = accumulation_dtype(x.dtype)
    if weight is None and x.dtype != dtype:
        weight = x.new_ones(normalized, dtype=dtype)  # without one PyTorch keeps half statistics
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(x, normalized, weight, bias, eps)
    return y, mean.view(lead), rstd.view(lead)


def _flat_parameters(dtype: torch.dtype, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each as [width] in ``dtype``, or None."""
    return tuple(None if p is None else p.flatten().to(dtype) for p in parameters)


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
    if native.runs(x):
        return native.backward(x, weight, mean, rstd, dy, axes, weight_grad, bias_grad)
    xs, dys = _flat(x, axes), _flat(dy, axes)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    (w,) = _flat_parameters(mean.dtype, weight)
    operands = (dys, xs, mean, rstd, w, weight_grad, bias_grad)
    wide = x.dtype == mean.dtype
    dx, *sums = _fused_backward(*operands) if wide else _half_backward(*operands)
    dtype, shape = x.dtype if weight is None else weight.dtype, x.shape[x.ndim - axes :]
    asked = (weight_grad, bias_grad)
    dw, db = (g.view(shape).to(dtype) if a else None for g, a in zip(sums, asked, strict=True))
    return dx.view(x.shape), dw, db


def _fused_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(14) of ``[rows, width]`` operands in one dtype, by PyTorch's kernel."""
    bias = mean.new_empty(x.shape[1]) if bias_grad else None  # only its shape and dtype are read
    return torch.ops.aten.native_layer_norm_backward(
        dy, x, x.shape[1:], mean, rstd, w, bias, [True, weight_grad, bias_grad]
    )


def _half_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor | None, *asked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(14) of half x and dy chunk by chunk in float32: PyTorch's kernel would sum dw and db in half precision."""
    scratch, dx = Scratch(mean.dtype, x.device), new_empty(x, *x.shape)
    dw, db = (mean.new_zeros(x.shape[1]) for _ in asked)
    for rows in _chunks(*x.shape):
        wide = scratch.load("dy", dy[rows]), scratch.load("x", x[rows])
        dx[rows], *sums = _fused_backward(*wide, mean[rows], rstd[rows], w, *asked)
        for total, part, wanted in zip((dw, db), sums, asked, strict=True):
            if wanted:
                total += part
    return dx, dw, db


class _Chunk(NamedTuple):
    """Some rows, dense and in the accumulation dtype."""

    x: Tensor  # [rows, width]
    dy: Tensor  # [rows, width]
    xh: Tensor  # [rows, width]
    mean: Tensor  # [rows, 1]
    rstd: Tensor  # [rows, 1]


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
    if ddx is None and ddw is None:
        gdy = dy.new_zeros(dy.shape)
        return None, None, gdy if ddb is None else gdy.add_(ddb)
    if native.runs(x):
        tensors = (x, weight, mean, rstd, dy, ddx, ddw, ddb)
        return native.double_backward(*tensors, axes, weight_grad)
    xs, dys, a = _flat(x, axes), _flat(dy, axes), None if ddx is None else _flat(ddx, axes)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    w, ddw, ddb = _flat_parameters(mean.dtype, weight, ddw, ddb)
    kept = a is not None and weight is not None and weight_grad
    gx, gdy = (new_empty(x, *xs.shape) for _ in range(2))
    gw = mean.new_zeros(xs.shape[1]) if kept else None
    scratch = Scratch(accumulation_dtype(x.dtype), x.device)
    for rows in _chunks(*xs.shape):
        xt, m, r = scratch.load("x", xs[rows]), mean[rows], rstd[rows]
        xh = torch.sub(xt, m, out=scratch.get("xh", *xt.shape)).mul_(r)
        t = _Chunk(xt, scratch.load("dy", dys[rows]), xh, m, r)
        h = scratch.get("h", *xt.shape)
        gdyt = gdy[rows] if gdy.dtype == h.dtype else scratch.get("gdy", *xt.shape)
        if a is None:
            rq = None
            h.zero_()
            gdyt.zero_()
        else:
            rq = _pull_ddx(scratch.load("ddx", a[rows]), t, w, h, gdyt, gw, scratch)
        if ddw is not None:
            h.addcmul_(t.dy, ddw)
            gdyt.addcmul_(xh, ddw)
        if ddb is not None:
            gdyt += ddb
        jh = _jacobian(h, t)
        gx[rows] = jh if rq is None else jh.addcmul_(xh, rq, value=-1)
        if gdyt.dtype != gdy.dtype:
            gdy[rows] = gdyt
    if gw is not None and weight is not None:
        gw = gw.view(weight.shape).to(weight.dtype)
    return gx.view(x.shape), gw, gdy.view(x.shape)


def _pull_ddx(
    a: Tensor,
    t: _Chunk,
    w: Tensor | None,
    h: Tensor,
    gdy: Tensor,
    gw: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """(15)-(17), (19): what ``a`` = ddx contributes, written into ``h``, ``gdy``, added to ``gw``.

    Returns r q [rows, 1].
    """
    s = _jacobian(a, t)
    product = torch.mul(t.dy, s, out=scratch.get("product", *a.shape))
    if gw is not None:
        gw += product.sum(0)
    q = product.sum(-1) if w is None else torch.mv(product, w)
    g = t.dy if w is None else torch.mul(t.dy, w, out=scratch.get("g", *a.shape))
    a2 = torch.mul(a, t.xh, out=product).mean(-1, keepdim=True)
    c2 = torch.mul(g, t.xh, out=product).mean(-1, keepdim=True)
    torch.mul(a, c2.mul_(t.rstd).neg_(), out=h).addcmul_(g, a2.mul_(t.rstd), value=-1)
    gdy.copy_(s) if w is None else torch.mul(s, w, out=gdy)
    return q[:, None].mul_(t.rstd / a.shape[1])


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of whole rows, in order; none if there is nothing to compute."""
    step = max(1, CHUNK_ELEMENTS * torch.get_num_threads() // max(width, 1))
    yield from (slice(i, min(rows, i + step)) for i in range(0, rows if width else 0, step))


def _jacobian(z: Tensor, t: _Chunk) -> Tensor:
    """(13): ``J z`` [rows, width], a new tensor, in one pass."""
    return _fused_backward(z, t.x, t.mean, t.rstd, None, False, False)[0]
