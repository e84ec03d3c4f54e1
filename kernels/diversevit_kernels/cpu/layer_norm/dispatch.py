"""LayerNorm on a CPU, (10)-(19) of kernels/README.md: which path computes the forward and the two backward passes.

C++       ``native``: float32 and bfloat16, where there is a C++ compiler; one kernel each.
PyTorch   ``blocked``: other dtypes, or without a compiler.

Shapes   x, y, dy [*lead, *normalized], ``axes`` normalized axes; weight, bias [*normalized]; mean, rstd [*lead].
Dtypes   any floating; a half x may have float32 parameters. Statistics, means and sums in float32 (float64 for
         float64).
"""

from torch import Tensor

from ...common.contracts import LayerNormBackward, LayerNormDoubleBackward
from . import blocked, native
from .inputs import Inputs


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12): ``y`` like x, ``mean`` and ``rstd`` [*lead]."""
    path = native if native.supports(x) else blocked
    return path.forward(x, weight, bias, axes, eps)


def layer_norm_backward(inputs: LayerNormBackward) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(14): ``dx`` like x, ``dw`` if ``weight_grad``, ``db`` if ``bias_grad``."""
    x, weight, mean, rstd, dy, axes, weight_grad, bias_grad = inputs
    path = native if native.supports(x) else blocked
    return path.backward(Inputs(x, weight, mean, rstd, dy, axes), weight_grad, bias_grad)


def layer_norm_double_backward(
    inputs: LayerNormDoubleBackward,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(15)-(19): ``gx`` like x, ``gw`` if ``weight_grad``, ``gdy`` like dy.

    An absent cotangent costs nothing. ``gx`` is None unless ``ddx`` or ``ddw`` is given, ``gw`` unless ``ddx`` is.
    """
    x, weight, mean, rstd, dy, ddx, ddw, ddb, axes, weight_grad = inputs
    if ddx is None and ddw is None:
        gdy = dy.new_zeros(dy.shape)
        return None, None, gdy if ddb is None else gdy.add_(ddb)
    path = native if native.supports(x) else blocked
    return path.double_backward(Inputs(x, weight, mean, rstd, dy, axes), ddx, ddw, ddb, weight_grad)
