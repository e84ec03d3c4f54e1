"""The work of LayerNorm on a CPU: operations on each element, and the partial sums of the parameters' gradients."""

from torch import Tensor

from ...common.contracts import LayerNormBackward, LayerNormDoubleBackward
from ...common.work import Work, layer_norm_operations

_PARTS = 64  # rows of partial sums for each parameter's gradient, csrc/layer_norm.cpp
_FLOAT = 4


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> Work:
    """(10)-(12)."""
    affine = (weight is not None) + (bias is not None)
    return Work(elementwise=layer_norm_operations("forward", affine) * x.numel())


def layer_norm_backward(inputs: LayerNormBackward) -> Work:
    """(14)."""
    asked = inputs.weight_grad + inputs.bias_grad
    operations = layer_norm_operations("backward", asked) * inputs.x.numel()
    return Work(elementwise=operations, workspace=_partial(inputs, asked))


def layer_norm_double_backward(inputs: LayerNormDoubleBackward) -> Work:
    """(15)-(19)."""
    asked = inputs.weight_grad and inputs.ddx is not None and inputs.weight is not None
    given = sum(y is not None for y in (inputs.ddx, inputs.ddw, inputs.ddb))
    operations = layer_norm_operations("double_backward", int(asked), given)
    return Work(elementwise=operations * inputs.x.numel(), workspace=_partial(inputs, int(asked)))


def _partial(inputs: LayerNormBackward | LayerNormDoubleBackward, count: int) -> int:
    width = inputs.x.shape[inputs.x.ndim - inputs.axes :].numel()
    return _PARTS * width * _FLOAT * count
