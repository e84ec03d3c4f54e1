"""Calls of ``native/gelu.cpp``: the three rungs of GELU, (20)-(26) of kernels/README.md, as C++ kernels.

Both forms, and both derivatives, are piecewise polynomials in |x| from one table (``Table`` there).

Shapes   any; operands are made dense, results are dense.
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

_SIZES = ("elements", "threads", "tanh")
_TENSORS = ("x", "dy", "ddx", "y", "dx", "gx", "gdy")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    )


def runs(x: Tensor) -> bool:
    """Whether there are native kernels for tensors like x."""
    return x.dtype in (torch.float32, torch.bfloat16) and library("gelu") is not None


def call(rung: str, approximate: str, *results: str, **operands: Tensor) -> tuple[Tensor, ...]:
    """Run a rung; operands and results by the names in ``_TENSORS``."""
    dense = {name: t.contiguous() for name, t in operands.items()}
    x = dense["x"]
    made = {name: new_empty(x, *x.shape) for name in results}
    request = _Call(
        *(x.numel(), kernel_threads(), approximate == "tanh"),
        **{name: t.data_ptr() for name, t in (*dense.items(), *made.items())},
    )
    functions: Any = library("gelu")
    functions[f"gelu_{rung}_{str(x.dtype).removeprefix('torch.')}"](ctypes.byref(request))
    return tuple(made.values())
