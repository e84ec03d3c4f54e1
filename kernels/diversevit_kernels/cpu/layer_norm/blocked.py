"""LayerNorm in PyTorch: forward, backward, double backward, equations (10)-(19) of kernels/README.md.

Forward and backward are PyTorch's own fused kernels, called so that statistics and sums are in the accumulation dtype
(for half types they would not be). The backward of half types and the double backward go through the rows chunk by
chunk, so that their buffers stay in the cache. PyTorch's fused backward serves as the Jacobian (13). Sums over rows are
added up chunk by chunk in order: same bits on every run with the same number of threads.

Shapes   as in ``dispatch``; inside the two backward passes [rows, width] and [width].
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
from .inputs import Inputs

CHUNK_ELEMENTS = 1 << 17
"""Elements of a chunk per thread (512 KiB in float32): the fastest of 2^14 ... 2^19, measured at 32 x 197 x 384.

With smaller chunks the calls cost more than caches save."""


def _flat(x: Tensor, axes: int) -> Tensor:
    """Return ``x`` as ``[rows, width]``; a view if its strides allow."""
    split = x.ndim - axes
    return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12): ``y`` like x, ``mean`` and ``rstd`` [*lead]."""
    lead, normalized = x.shape[: x.ndim - axes], x.shape[x.ndim - axes :]
    dtype = accumulation_dtype(x.dtype)
    if weight is None and x.dtype != dtype:
        weight = x.new_ones(
            normalized, dtype=dtype
        )  # without a weight PyTorch's statistics are half
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    y, mean, rstd = torch.native_layer_norm(x, normalized, weight, bias, eps)
    return y, mean.view(lead), rstd.view(lead)


def _flat_parameters(dtype: torch.dtype, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return each parameter that is given as [width] in ``dtype``."""
    return tuple(None if p is None else p.flatten().to(dtype) for p in parameters)


def backward(
    inputs: Inputs, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(14): ``dx`` like x, ``dw`` if ``weight_grad``, ``db`` if ``bias_grad``."""
    x, weight, mean, rstd, dy, axes = inputs
    xs, dys = _flat(x, axes), _flat(dy, axes)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    (w,) = _flat_parameters(mean.dtype, weight)
    operands = (dys, xs, mean, rstd, w, weight_grad, bias_grad)
    same = x.dtype == mean.dtype
    dx, *sums = _fused_backward(*operands) if same else _half_backward(*operands)
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
    """(14) for half x and dy, chunk by chunk in float32: PyTorch's kernel would sum dw and db in half precision."""
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
    """Some rows, contiguous and in the accumulation dtype."""

    x: Tensor  # [rows, width]
    dy: Tensor  # [rows, width]
    xh: Tensor  # [rows, width] normalized x
    mean: Tensor  # [rows, 1]
    rstd: Tensor  # [rows, 1]


def double_backward(
    inputs: Inputs,
    ddx: Tensor | None,
    ddw: Tensor | None,
    ddb: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(15)-(19): ``gx`` like x, ``gw`` if ``ddx`` and ``weight_grad``, ``gdy`` like dy; ``ddx`` or ``ddw`` is given."""
    x, weight, mean, rstd, dy, axes = inputs
    xs, dys, ddxs = _flat(x, axes), _flat(dy, axes), None if ddx is None else _flat(ddx, axes)
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    w, ddw, ddb = _flat_parameters(mean.dtype, weight, ddw, ddb)
    asked = ddxs is not None and weight is not None and weight_grad
    gx, gdy = (new_empty(x, *xs.shape) for _ in range(2))
    gw = mean.new_zeros(xs.shape[1]) if asked else None
    scratch = Scratch(accumulation_dtype(x.dtype), x.device)
    for rows in _chunks(*xs.shape):
        xt, m, r = scratch.load("x", xs[rows]), mean[rows], rstd[rows]
        xh = torch.sub(xt, m, out=scratch.get("xh", *xt.shape)).mul_(r)
        t = _Chunk(xt, scratch.load("dy", dys[rows]), xh, m, r)
        gxh = scratch.get("gxh", *xt.shape)
        gdyt = gdy[rows] if gdy.dtype == gxh.dtype else scratch.get("gdy", *xt.shape)
        if ddxs is None:
            along = None
            gxh.zero_()
            gdyt.zero_()
        else:
            along = _pull_ddx(scratch.load("ddx", ddxs[rows]), t, w, gxh, gdyt, gw, scratch)
        if ddw is not None:
            gxh.addcmul_(t.dy, ddw)
            gdyt.addcmul_(xh, ddw)
        if ddb is not None:
            gdyt += ddb
        jacobian = _jacobian(gxh, t)
        gx[rows] = jacobian if along is None else jacobian.addcmul_(xh, along, value=-1)
        if gdyt.dtype != gdy.dtype:
            gdy[rows] = gdyt
    if gw is not None and weight is not None:
        gw = gw.view(weight.shape).to(weight.dtype)
    return gx.view(x.shape), gw, gdy.view(x.shape)


def _pull_ddx(
    ddx: Tensor,
    t: _Chunk,
    w: Tensor | None,
    gxh: Tensor,
    gdy: Tensor,
    gw: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """(15)-(17), (19): write the terms of ``ddx`` into ``gxh`` and ``gdy``, and add those of ``gw``.

    Returns rstd alpha3 of (18), [rows, 1].
    """
    ddxh = _jacobian(ddx, t)
    product = torch.mul(t.dy, ddxh, out=scratch.get("product", *ddx.shape))
    if gw is not None:
        gw += product.sum(0)
    sum3 = product.sum(-1) if w is None else torch.mv(product, w)
    dxh = t.dy if w is None else torch.mul(t.dy, w, out=scratch.get("dxh", *ddx.shape))
    alpha1 = torch.mul(ddx, t.xh, out=product).mean(-1, keepdim=True)
    alpha2 = torch.mul(dxh, t.xh, out=product).mean(-1, keepdim=True)
    torch.mul(ddx, alpha2.mul_(t.rstd).neg_(), out=gxh)
    gxh.addcmul_(dxh, alpha1.mul_(t.rstd), value=-1)
    gdy.copy_(ddxh) if w is None else torch.mul(ddxh, w, out=gdy)
    return sum3[:, None].mul_(t.rstd / ddx.shape[1])


def _chunks(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of rows in order; none if there is nothing to compute."""
    step = max(1, CHUNK_ELEMENTS * torch.get_num_threads() // max(width, 1))
    yield from (slice(i, min(rows, i + step)) for i in range(0, rows if width else 0, step))


def _jacobian(z: Tensor, t: _Chunk) -> Tensor:
    """(13): ``J z`` [rows, width], a new tensor, in one pass."""
    return _fused_backward(z, t.x, t.mean, t.rstd, None, False, False)[0]
