"""Call the C++ kernels of GELU (``csrc/gelu.cpp``): forward, backward, double backward.

Both forms and their derivatives are piecewise polynomials in |x|, whose coefficients are looked up in a table.

Shapes   any; operands are made contiguous, results are contiguous.
Dtypes   float32, and bfloat16, which is read and written as such and computed in float32.
Traffic  every operand is read once and every result written once.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...common.forks import kernel_threads
from ..runtime.allocator import new_empty
from ..runtime.cpp_library import library
from ..runtime.pointers import pointers

_SIZES = ("elements", "threads", "tanh")
_TENSORS = ("x", "dy", "ddx", "y", "dx", "gx", "gdy")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    )


def supports(x: Tensor) -> bool:
    """Return whether there are kernels for tensors like x."""
    return x.dtype in (torch.float32, torch.bfloat16) and library("gelu") is not None


def call(direction: str, approximate: str, *results: str, **operands: Tensor) -> tuple[Tensor, ...]:
    """Run the kernel of a ``direction``: "forward", "backward" or "double_backward".

    Args:
        results: names, of ``_TENSORS``, of what it computes; returned in this order.
        operands: what it reads, by the names in ``_TENSORS``.
    """
    dense = {name: t.contiguous() for name, t in operands.items()}
    x = dense["x"]
    made = {name: new_empty(x, *x.shape) for name in results}
    request = _Call(
        *(x.numel(), kernel_threads(), approximate == "tanh"),
        **pointers(dense | made),
    )
    functions: Any = library("gelu")
    functions[f"gelu_{direction}_{str(x.dtype).removeprefix('torch.')}"](ctypes.byref(request))
    return tuple(made.values())


def forward(x: Tensor, approximate: str) -> Tensor:
    """(20) or (23)."""
    (y,) = call("forward", approximate, "y", x=x)
    return y


def backward(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    """(26): ``dx``."""
    (dx,) = call("backward", approximate, "dx", x=x, dy=dy)
    return dx


def double_backward(x: Tensor, dy: Tensor, ddx: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """(26): ``gx`` and ``gdy``."""
    gx, gdy = call("double_backward", approximate, "gx", "gdy", x=x, dy=dy, ddx=ddx)
    return gx, gdy
