"""The work of GELU on a CPU: one pass over the elements."""

from torch import Tensor

from ...common.contracts import GeluBackward, GeluDoubleBackward
from ...common.work import GELU_OPERATIONS, Work


def gelu_forward(x: Tensor, approximate: str) -> Work:
    """(20) or (23): ``y``."""
    return Work(elementwise=GELU_OPERATIONS["forward"] * x.numel())


def gelu_backward(inputs: GeluBackward) -> Work:
    """(26): ``dx``."""
    return Work(elementwise=GELU_OPERATIONS["backward"] * inputs.x.numel())


def gelu_double_backward(inputs: GeluDoubleBackward) -> Work:
    """(26): ``gx`` and ``gdy``."""
    return Work(elementwise=GELU_OPERATIONS["double_backward"] * inputs.x.numel())
