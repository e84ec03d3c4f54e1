"""Calls of ``native/layer_norm.cpp``: the three rungs of LayerNorm, (10)-(19) of kernels/README.md, as C++ kernels.

Shapes   tiles x, dy, ddx and results like them [rows, width]; mean, rstd [rows]; parameters and results like them
         [width]. All dense.
Dtypes   tiles float32 or bfloat16, which is read and written as such and computed in float32; all else float32.
Bits     the same on any number of threads.
Memory   64 rows of sums for each parameter's gradient.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from ...common.forks import kernel_threads
from ..runtime.allocator import new_empty
from ..runtime.cpp_library import library

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


def call(rung: str, x: Tensor, axes: int, eps: float = 0.0, **tensors: Tensor | None) -> None:
    """Run a rung on x, whose last ``axes`` are the width; ``tensors`` are its other operands, dense or not, and its
    results, dense, by the names in ``_TENSORS``."""
    given = {"x": x, **tensors}
    dense = {
        name: t.contiguous() for name, t in given.items() if t is not None
    }  # alive until the end
    split = x.ndim - axes
    request = _Call(
        *(math.prod(x.shape[:split]), math.prod(x.shape[split:]), kernel_threads(), eps),
        **{name: t.data_ptr() for name, t in dense.items()},
    )
    functions: Any = library("layer_norm")
    functions[f"layer_norm_{rung}_{str(x.dtype).removeprefix('torch.')}"](ctypes.byref(request))


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12)."""
    y, lead = new_empty(x, *x.shape), x.shape[: x.ndim - axes]
    mean, rstd = (x.new_empty(lead, dtype=torch.float32) for _ in range(2))
    parameters = {"w": _single(weight), "b": _single(bias)}
    call("forward", x, axes, eps, **parameters, y=y, mean=mean, rstd=rstd)
    return y, mean, rstd


def backward(
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    axes: int,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(14)."""
    dx, shape = new_empty(x, *x.shape), x.shape[x.ndim - axes :]
    dw, db = (mean.new_empty(shape) if asked else None for asked in (weight_grad, bias_grad))
    given = {"dy": dy, "w": _single(weight), "mean": mean, "rstd": rstd}
    call("backward", x, axes, **given, dx=dx, dw=dw, db=db)
    like = x if weight is None else weight
    return dx, _as(dw, like), _as(db, like)


def double_backward(
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    ddx: Tensor | None,
    ddw: Tensor | None,
    ddb: Tensor | None,
    axes: int,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(15)-(19), ``ddx`` or ``ddw`` given."""
    gx, gdy = (new_empty(x, *x.shape) for _ in range(2))
    kept = ddx is not None and weight is not None and weight_grad
    gw = mean.new_empty(x.shape[x.ndim - axes :]) if kept else None
    parameters = {"w": _single(weight), "ddw": _single(ddw), "ddb": _single(ddb)}
    given = {"dy": dy, "ddx": ddx, "mean": mean, "rstd": rstd, **parameters}
    call("double_backward", x, axes, **given, gx=gx, gdy=gdy, gw=gw)
    return gx, gw if weight is None else _as(gw, weight), gdy


def _single(p: Tensor | None) -> Tensor | None:
    return p if p is None or p.dtype == torch.float32 else p.float()


def _as(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return grad if grad is None or grad.dtype == like.dtype else grad.to(like.dtype)
