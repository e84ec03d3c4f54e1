"""Calls of ``native/layer_norm.cpp``: the three rungs of LayerNorm, (10)-(19) of kernels/README.md, as C++ kernels.

Shapes   tiles x, dy, ddx and results like them [rows, width]; mean, rstd [rows]; parameters and results like them
         [width]. All dense.
Dtypes   tiles float32 or bfloat16, which is read and written as such and computed in float32; all else float32.
Bits     the same on any number of threads.
Memory   64 rows of sums for each parameter's gradient.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from .native import library

_TENSORS = (
    *("x", "dy", "ddx", "w", "b", "ddw", "ddb", "mean", "rstd"),
    *("y", "dx", "gx", "gdy", "dw", "db", "gw"),
)


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width", "threads")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    )


def runs(x: Tensor) -> bool:
    """Whether there are native kernels for tiles like x."""
    known = x.dtype in (torch.float32, torch.bfloat16)
    return known and x.numel() > 0 and library("layer_norm") is not None


def call(rung: str, x: Tensor, eps: float = 0.0, **tensors: Tensor | None) -> None:
    """Run a rung on the tile x; ``tensors`` are its other operands and its results, by the names in ``_TENSORS``."""
    given = {"x": x, **tensors}
    dense = {
        name: t.contiguous() for name, t in given.items() if t is not None
    }  # alive until the end
    request = _Call(
        *(*x.shape, torch.get_num_threads(), eps),
        **{name: t.data_ptr() for name, t in dense.items()},
    )
    functions: Any = library("layer_norm")
    functions[f"layer_norm_{rung}_{str(x.dtype).removeprefix('torch.')}"](ctypes.byref(request))
