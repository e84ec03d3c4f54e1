"""Call the C++ kernels of LayerNorm (``csrc/layer_norm.cpp``): forward, backward, double backward.

Shapes   tiles x, dy, ddx and results like them [rows, width]; mean, rstd [rows]; parameters and results like them
         [width]. All contiguous.
Dtypes   tiles float32 or bfloat16, which is read and written as such and computed in float32; all else float32.
Bits     the same on any number of threads.
Memory   64 rows of partial sums for each parameter's gradient.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from ...common.forks import kernel_threads
from ..runtime.allocator import new_empty
from ..runtime.cpp_library import library
from ..runtime.pointers import pointers
from .inputs import Inputs

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


def supports(x: Tensor) -> bool:
    """Return whether there are kernels for tensors like x."""
    known = x.dtype in (torch.float32, torch.bfloat16)
    return known and x.numel() > 0 and library("layer_norm") is not None


def call(direction: str, x: Tensor, axes: int, eps: float = 0.0, **tensors: Tensor | None) -> None:
    """Run the kernel of a ``direction``: "forward", "backward" or "double_backward".

    Args:
        axes: how many of x's last axes make up the width.
        tensors: the other operands and the results (contiguous), by the names in ``_TENSORS``.
    """
    given = {"x": x, **tensors}
    # a dictionary, so that copies stay alive until the kernel has run
    dense = {name: t.contiguous() for name, t in given.items() if t is not None}
    split = x.ndim - axes
    request = _Call(
        *(math.prod(x.shape[:split]), math.prod(x.shape[split:]), kernel_threads(), eps),
        **pointers(dense),
    )
    functions: Any = library("layer_norm")
    functions[f"layer_norm_{direction}_{str(x.dtype).removeprefix('torch.')}"](
        ctypes.byref(request)
    )


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(10)-(12): ``y``, ``mean``, ``rstd``."""
    y, lead = new_empty(x, *x.shape), x.shape[: x.ndim - axes]
    mean, rstd = (x.new_empty(lead, dtype=torch.float32) for _ in range(2))
    parameters = {"w": _float32(weight), "b": _float32(bias)}
    call("forward", x, axes, eps, **parameters, y=y, mean=mean, rstd=rstd)
    return y, mean, rstd


def backward(
    inputs: Inputs, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(14): ``dx``, ``dw``, ``db``."""
    x, weight, mean, rstd, dy, axes = inputs
    dx, shape = new_empty(x, *x.shape), x.shape[x.ndim - axes :]
    dw, db = (mean.new_empty(shape) if asked else None for asked in (weight_grad, bias_grad))
    given = {"dy": dy, "w": _float32(weight), "mean": mean, "rstd": rstd}
    call("backward", x, axes, **given, dx=dx, dw=dw, db=db)
    like = x if weight is None else weight
    return dx, _in_dtype_of(dw, like), _in_dtype_of(db, like)


def double_backward(
    inputs: Inputs,
    ddx: Tensor | None,
    ddw: Tensor | None,
    ddb: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(15)-(19): ``gx``, ``gw``, ``gdy``; ``ddx`` or ``ddw`` is given."""
    x, weight, mean, rstd, dy, axes = inputs
    gx, gdy = (new_empty(x, *x.shape) for _ in range(2))
    asked = ddx is not None and weight is not None and weight_grad
    gw = mean.new_empty(x.shape[x.ndim - axes :]) if asked else None
    parameters = {"w": _float32(weight), "ddw": _float32(ddw), "ddb": _float32(ddb)}
    given = {"dy": dy, "ddx": ddx, "mean": mean, "rstd": rstd, **parameters}
    call("double_backward", x, axes, **given, gx=gx, gdy=gdy, gw=gw)
    return gx, gw if weight is None else _in_dtype_of(gw, weight), gdy


def _float32(p: Tensor | None) -> Tensor | None:
    """Return a parameter in float32."""
    return p if p is None or p.dtype == torch.float32 else p.float()


def _in_dtype_of(grad: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a gradient in the dtype of ``like``."""
    return grad if grad is None or grad.dtype == like.dtype else grad.to(like.dtype)
