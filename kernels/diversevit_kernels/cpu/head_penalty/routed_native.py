"""Call the C++ kernels of the routed penalty (``csrc/routed_head_penalty.cpp``): all but its H x H algebra.

Shapes   grad_qkv [B, N, 3, H, d]; weight [3, H, d, D]; Gram matrices and M [B, N, H, H] by token, [B, H, H] by sample.
Dtypes   float32, float64, bfloat16, the same for both; Gram matrices, M and the weight's gradient in the accumulation
         dtype. bfloat16 is multiplied as such and summed in float32; du, which is float32, is multiplied as a sum of
         two bfloat16. Where the processor cannot multiply bfloat16 everything is converted to float32.
Bits     the same on any number of threads.
Memory   a chunk of u (4 MiB), its du and its part of grad_qkv; the weight twice; its gradient in the accumulation
         dtype.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ...common.forks import kernel_threads
from ...common.grouping import Grouping
from ...common.torch_internals import has_bfloat16_instructions
from ..runtime.allocator import new_empty
from ..runtime.cpp_library import library
from ..runtime.pointers import pointers

_Int = ctypes.c_int64


class _Routes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", _Int * 4))


class _Weight(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", _Int * 3))


_STRIDED = {"grad_qkv": _Routes, "dgrad_qkv": _Routes, "weight": _Weight}
_SIZES = ("B", "N", "H", "d", "D", "by_token", "threads")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Int) for name in _SIZES),
        *_STRIDED.items(),
        *((name, ctypes.c_void_p) for name in ("gram", "m", "dweight")),
    )


def supports(grad_qkv: Tensor, weight: Tensor) -> bool:
    """Return whether there are kernels for tensors like these."""
    known = grad_qkv.dtype in (torch.float32, torch.float64, torch.bfloat16)
    alike = grad_qkv.dtype == weight.dtype and min(grad_qkv.numel(), weight.numel()) > 0
    return known and alike and library("routed_head_penalty") is not None


def gram(g: Grouping, grad_qkv: Tensor, weight: Tensor) -> Tensor:
    """(40), (30): the Gram matrices ``u u^T``, [B, N, H, H] by token, [B, H, H] by sample."""
    functions: Any = library("routed_head_penalty")
    dtype = accumulation_dtype(grad_qkv.dtype)
    parts = () if g.by_token else (_call(functions, "parts", g, grad_qkv, weight),)
    lead = (g.B, g.N) if g.by_token else (g.B, *parts)
    found = grad_qkv.new_empty(*lead, g.H, g.H, dtype=dtype)
    _call(functions, "gram", g, grad_qkv, weight, gram=found)
    return found if g.by_token else found.sum(1)


def backward(g: Grouping, grad_qkv: Tensor, weight: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """(42), du = M u: ``dgrad_qkv`` and ``dweight``, contiguous, the latter in the accumulation dtype."""
    if grad_qkv.dtype == torch.bfloat16 and not has_bfloat16_instructions():
        dr, dw = backward(g, grad_qkv.float(), weight.float(), m)
        return dr.to(grad_qkv.dtype), dw
    functions: Any = library("routed_head_penalty")
    dr, m = new_empty(grad_qkv, *grad_qkv.shape), m.contiguous()
    dw = m.new_empty(weight.shape)
    _call(functions, "backward", g, grad_qkv, weight, dgrad_qkv=dr, m=m, dweight=dw)
    return dr, dw


def _call(functions: Any, name: str, g: Grouping, r: Tensor, w: Tensor, **tensors: Tensor) -> int:
    """Call a function of the library; ``tensors`` are its other operands and results, by the names in ``_Call``."""
    r, w = (x if x.stride(-1) == 1 else x.contiguous() for x in (r, w))
    sizes = (g.B, g.N, g.H, r.shape[-1], w.shape[-1], g.by_token, kernel_threads())
    tensors |= {"grad_qkv": r, "weight": w}
    places = {name: _place(name, tensors[name], at) for name, at in pointers(tensors).items()}
    request = _Call(**dict(zip(_SIZES, sizes, strict=True)), **places)
    dtype = str(r.dtype).removeprefix("torch.")
    return functions[f"routed_head_penalty_{name}_{dtype}"](ctypes.byref(request))


def _place(name: str, x: Tensor, at: int) -> Any:
    """Where the tensor is, and the strides of all axes but the last where the library asks for them."""
    kind = _STRIDED.get(name)
    return at if kind is None else kind(at, (_Int * (x.ndim - 1))(*x.stride()[:-1]))
