"""LayerNorm by its definition: equations (10)-(19) of ``kernels/README.md``."""

import torch
from torch import Tensor

from diversevit_kernels.common.contracts import LayerNormBackward, LayerNormDoubleBackward


def layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(12)  y = w xh + b over the last axes, of sizes ``normalized_shape``.   y is like x."""
    return layer_norm_forward(x, weight, bias, len(normalized_shape), eps)[0]


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12)  ``y`` like x, ``mean`` and ``rstd`` [*lead], the latter two at least float32."""
    over = tuple(range(-axes, 0))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(over, keepdim=True)
    rstd = ((wide - mean).square().mean(over, keepdim=True) + eps).rsqrt()
    y = (wide - mean) * rstd
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    lead = x.shape[: x.ndim - axes]
    return y.to(x.dtype), mean.reshape(lead), rstd.reshape(lead)


def layer_norm_backward(inputs: LayerNormBackward) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(14)  Pull the cotangent ``dy`` of the output back to x, weight and bias."""
    x, weight, mean, rstd, dy, axes, weight_grad, bias_grad = inputs
    xh, r, dy_wide = _normalized(x, mean, rstd, dy, axes)
    dx = _layer_norm_jacobian(dy_wide if weight is None else dy_wide * weight, xh, r, axes)
    dw = (dy_wide * xh).sum_to_size(x.shape[x.ndim - axes :]) if weight_grad else None
    db = dy_wide.sum_to_size(x.shape[x.ndim - axes :]) if bias_grad else None
    dtype = x.dtype if weight is None else weight.dtype
    dw, db = (None if g is None else g.to(dtype) for g in (dw, db))
    return dx.to(x.dtype), dw, db


def layer_norm_double_backward(
    inputs: LayerNormDoubleBackward,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(15)-(19)  Pull the cotangents of (14) back to x, weight and dy; None if none can reach."""
    x, weight, mean, rstd, dy, ddx, ddw, ddb, axes, weight_grad = inputs
    over = tuple(range(-axes, 0))
    xh, r, dy = _normalized(x, mean, rstd, dy, axes)
    has_ddx, reaches_x = ddx is not None, not (ddx is None and ddw is None)
    given = (ddx, ddw, ddb)
    ddx, ddw, ddb = (torch.zeros_like(x, dtype=r.dtype) if t is None else t for t in given)
    w = torch.ones_like(xh) if weight is None else weight
    ddxh = _layer_norm_jacobian(ddx, xh, r, axes)
    products = (ddx * xh, w * dy * xh, w * dy * ddxh)
    alpha1, alpha2, alpha3 = (t.mean(over, keepdim=True) for t in products)
    gxh = dy * ddw - r * (alpha2 * ddx + alpha1 * w * dy)
    gx = (_layer_norm_jacobian(gxh, xh, r, axes) - r * alpha3 * xh).to(x.dtype)
    gdy = (w * ddxh + xh * ddw + ddb).to(x.dtype)
    gw = None
    if weight is not None and weight_grad and has_ddx:
        gw = (dy * ddxh).sum_to_size(weight.shape).to(weight.dtype)
    return gx if reaches_x else None, gw, gdy


def _normalized(
    x: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, axes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(11)  xh, rstd [*lead, 1, ...] and dy, all at least float32."""
    mean, rstd = (t.reshape(*t.shape, *[1] * axes) for t in (mean, rstd))
    return (x - mean) * rstd, rstd, dy.to(rstd.dtype)


def _layer_norm_jacobian(z: Tensor, xh: Tensor, r: Tensor, axes: int) -> Tensor:
    """(13)  J z = rstd (z - mean(z) - xh mean(xh z)), the derivative of xh, symmetric."""
    over = tuple(range(-axes, 0))
    return r * (z - z.mean(over, keepdim=True) - xh * (xh * z).mean(over, keepdim=True))
