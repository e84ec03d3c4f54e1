"""Call the C++ kernels of attention (``csrc/attention.cpp``): forward, backward, double backward.

Shapes   as in ``dispatch``; the last axis of an operand is made dense if it is not.
Dtypes   float32, float64, and bfloat16, which is read and written as such and computed in float32.
Bits     a (sample, key head) pair belongs to one thread: the same on any number of threads.
Memory   each thread keeps its scratch memory for later calls: keys, values and sums of a pair, and tiles of 1 MiB.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ...common.forks import kernel_threads
from ..runtime.cpp_library import library
from .inputs import Inputs

_Int = ctypes.c_int64


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", _Int * 3))


class _Mask(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", _Int * 4), ("kind", _Int))


_SIZES = ("B", "H", "Hkv", "Nq", "Nk", "d", "dv", "is_causal", "threads")
_TENSORS = ("q", "k", "v", "o", "do", "ddq", "ddk", "ddv", "gq", "gk", "gv", "gdo")


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Int) for name in _SIZES),
        *(("scale", ctypes.c_double), ("mask", _Mask), ("softmax", ctypes.c_void_p)),
        *((name, _Tensor) for name in _TENSORS),
    )


def supports(q: Tensor, mask_gradient: bool = False) -> bool:
    """Return whether there is a kernel for tensors like q; there is none for a mask's gradient."""
    known = q.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return known and not mask_gradient and library("attention") is not None


def call(direction: str, inputs: Inputs, softmax: Tensor, **tensors: Tensor | None) -> None:
    """Run the kernel of a ``direction``: "forward", "backward" or "double_backward".

    Args:
        softmax: the statistics (1a) in the accumulation dtype; contiguous where it is a result.
        tensors: the other operands and the results, by the names in ``_TENSORS``; a backward's results are gq, gk, gv.
    """
    q, k, v, mask, is_causal, scale = inputs
    given = {"q": q, "k": k, "v": v, **tensors}
    # a dictionary, so that copies stay alive until the kernel has run
    dense = {name: _dense(x) for name, x in given.items() if x is not None}
    softmax = softmax.contiguous()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(accumulation_dtype(q.dtype))
    (B, H, Nq, d), (_, Hkv, Nk, dv) = q.shape, v.shape
    sizes = (B, H, Hkv, Nq, Nk, d, dv, is_causal, kernel_threads())
    request = _Call(
        **dict(zip(_SIZES, sizes, strict=True)),
        scale=scale,
        mask=_mask_struct(mask),
        softmax=softmax.data_ptr(),
        **{name: _Tensor(x.data_ptr(), (_Int * 3)(*x.stride()[:3])) for name, x in dense.items()},
    )
    functions: Any = library("attention")
    dtype = str(q.dtype).removeprefix("torch.")
    functions[f"attention_{direction}_{dtype}"](ctypes.byref(request))


def _dense(x: Tensor) -> Tensor:
    """Return x with a contiguous last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _mask_struct(mask: Tensor | None) -> _Mask:
    """Describe the mask to the kernel, with strides of 0 where it is broadcast."""
    if mask is None:
        return _Mask()
    strides = (0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
    return _Mask(mask.data_ptr(), (_Int * 4)(*strides), 1 if mask.dtype == torch.bool else 2)
