"""PyTorch's own kernels for the first order of GELU and LayerNorm, which on a GPU are as fast as any.

Functions take the arguments of an operator. PyTorch has no kernels for the double backward, none for parameters of
another dtype than x, and none for the gradient of a bias without a weight.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._torch_internals import function_of_aten

_gelu = F.gelu
_layer_norm = torch.native_layer_norm
_gelu_backward = function_of_aten(torch.ops.aten.gelu_backward.default)
_layer_norm_backward = function_of_aten(torch.ops.aten.native_layer_norm_backward.default)


def takes_gelu(*args: Any) -> bool:
    """Whether PyTorch's kernels take the arguments: all that the operator takes."""
    return True


def gelu(x: Tensor, approximate: str) -> Tensor:
    """``y`` of GELU."""
    return _gelu(x, approximate=approximate)


def gelu_backward(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    """``dx`` of GELU."""
    return _gelu_backward(dy, x, approximate=approximate)


def takes_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> bool:
    """Whether PyTorch's kernels take the parameters, in the backward pass too."""
    if weight is None:
        return bias is None
    return weight.dtype is x.dtype


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``mean`` and ``rstd`` of LayerNorm; the last two have an axis of size 1 for each normalized one."""
    return _layer_norm(x, _last_sizes(x, axes), weight, bias, eps)


def takes_layer_norm_backward(x: Tensor, weight: Tensor | None, *rest: Any) -> bool:
    """Whether PyTorch's kernels take the parameters."""
    *_, bias_grad = rest
    return not bias_grad if weight is None else weight.dtype is x.dtype


def layer_norm_gradients(
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    axes: int,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``dx``, ``dw`` and ``db`` of LayerNorm; None for a gradient that is not asked for."""
    asked = [True, weight_grad, bias_grad]
    return _layer_norm_backward(dy, x, _last_sizes(x, axes), mean, rstd, weight, weight, asked)


def layer_norm_backward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``layer_norm_gradients``, with no elements for a gradient that is not asked for."""
    dx, *grads = layer_norm_gradients(x, *rest)
    dw, db = (x.new_empty(0) if g is None else g for g in grads)
    return dx, dw, db


def _last_sizes(x: Tensor, axes: int) -> list[int]:
    """The sizes of the last axes; PyTorch reads a list faster than a part of a shape."""
    return [x.shape[-1]] if axes == 1 else list(x.shape[-axes:])
