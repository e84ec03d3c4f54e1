"""GELU on a CPU, (20)-(26) of kernels/README.md: which path computes the forward and the two backward passes.

C++       ``native``: float32 and bfloat16, where there is a C++ compiler; one pass each.
PyTorch   ``blocked``: other dtypes, or without a compiler.

Shapes   any; every operand and result has the shape of x. Results are contiguous.
Dtypes   any floating; arithmetic in float32 (float64 for float64).
"""

from torch import Tensor

from ...common.contracts import GeluBackward, GeluDoubleBackward
from . import blocked, native


def gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """(20) or (23): ``y``."""
    path = native if native.supports(x) else blocked
    return path.forward(x, approximate)


def gelu_backward(inputs: GeluBackward) -> Tensor:
    """(26): ``dx``."""
    x, dy, approximate = inputs
    path = native if native.supports(x) else blocked
    return path.backward(x, dy, approximate)


def gelu_double_backward(inputs: GeluDoubleBackward) -> tuple[Tensor, Tensor]:
    """(26): ``gx`` and ``gdy``."""
    x, dy, ddx, approximate = inputs
    path = native if native.supports(x) else blocked
    return path.double_backward(x, dy, ddx, approximate)
