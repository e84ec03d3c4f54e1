"""Call the C++ kernels of attention (``csrc/attention.cpp``): forward, backward, double backward.

Shapes   as in ``dispatch``; the last axis of an operand is made dense if it is not.
Dtypes   float32, float64, and bfloat16, which is read and written as such and computed in float32; float16 by copies
         in float32 of operands and results.
Bits     a (sample, key head) pair belongs to one thread: the same on any number of threads.
Memory   each thread keeps its scratch memory for later calls: keys, values and sums of a pair, and tiles of 1 MiB.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...common.dropout import threshold
from ...common.dtypes import accumulation_dtype
from ...common.forks import kernel_threads
from ..runtime.cpp_library import library
from ..runtime.pointers import pointers
from .inputs import Inputs

_Int = ctypes.c_int64


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", _Int * 3))


class _Mask(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", _Int * 4), ("kind", _Int))


_SIZES = ("B", "H", "Hkv", "Nq", "Nk", "d", "dv", "is_causal", "threads")
_TENSORS = ("q", "k", "v", "o", "do", "ddq", "ddk", "ddv", "gq", "gk", "gv", "gdo")
_RESULTS = {"o", "gq", "gk", "gv", "gdo"}


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Int) for name in _SIZES),
        *(("scale", ctypes.c_double), ("mask", _Mask), ("ddmask", _Mask), ("gmask", _Mask)),
        ("softmax", ctypes.c_void_p),
        *((name, _Tensor) for name in _TENSORS),
        *(("seed", ctypes.c_void_p), ("threshold", _Int), ("larger", ctypes.c_double)),
    )


def supports(q: Tensor) -> bool:
    """Return whether there is a kernel for tensors like q."""
    known = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return q.dtype in known and library("attention") is not None


def call(
    direction: str,
    inputs: Inputs,
    softmax: Tensor,
    ddmask: Tensor | None = None,
    mask_grad: bool = False,
    **tensors: Tensor | None,
) -> Tensor | None:
    """Run the kernel of a ``direction``: "forward", "backward" or "double_backward".

    Args:
        softmax: the statistics (1a) in the accumulation dtype; contiguous where it is a result.
        ddmask: the cotangent of the mask's gradient.
        mask_grad: of a backward pass, whether to return the mask's gradient, else None is returned.
        tensors: the other operands and the results, by the names in ``_TENSORS``; a backward's results are gq, gk, gv.
    """
    q, k, v, mask, seed, is_causal, scale, dropout_p = inputs
    half = q.dtype == torch.float16
    given = {name: x for name, x in {"q": q, "k": k, "v": v, **tensors}.items() if x is not None}
    # a dictionary, so that copies stay alive until the kernel has run
    dense = {name: _dense(_in_float32(name, x) if half else x) for name, x in given.items()}
    softmax = softmax.contiguous()
    wide = accumulation_dtype(q.dtype)
    added = None if mask is None or mask.dtype == torch.bool else mask.to(wide)
    cotangent = None if ddmask is None else ddmask.to(wide)
    gradient = mask.new_zeros(mask.shape, dtype=wide) if mask_grad and mask is not None else None
    (B, H, Nq, d), (_, Hkv, Nk, dv) = q.shape, v.shape
    sizes = (B, H, Hkv, Nq, Nk, d, dv, is_causal, kernel_threads())
    places = pointers(dense)
    request = _Call(
        **dict(zip(_SIZES, sizes, strict=True)),
        scale=scale,
        mask=_mask_struct(mask if added is None else added),
        ddmask=_mask_struct(cotangent),
        gmask=_mask_struct(gradient),
        softmax=softmax.data_ptr(),
        **{name: _Tensor(at, (_Int * 3)(*dense[name].stride()[:3])) for name, at in places.items()},
    )
    if seed is not None:
        request.seed = seed.data_ptr()
        request.threshold, request.larger = threshold(dropout_p), 1 / (1 - dropout_p)
    functions: Any = library("attention")
    dtype = str(dense["q"].dtype).removeprefix("torch.")
    functions[f"attention_{direction}_{dtype}"](ctypes.byref(request))
    for name in _RESULTS & given.keys() if half else ():
        given[name].copy_(dense[name])
    return None if gradient is None or mask is None else gradient.to(mask.dtype)


def _in_float32(name: str, x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32) if name in _RESULTS else x.float()


def _dense(x: Tensor) -> Tensor:
    """Return x with a contiguous last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _mask_struct(mask: Tensor | None) -> _Mask:
    """Describe the mask to the kernel, with strides of 0 where it is broadcast."""
    if mask is None:
        return _Mask()
    strides = (0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
    return _Mask(mask.data_ptr(), (_Int * 4)(*strides), 1 if mask.dtype == torch.bool else 2)
