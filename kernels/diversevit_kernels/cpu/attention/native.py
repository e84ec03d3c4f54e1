"""Calls of ``native/attention.cpp``: the three rungs of attention, (1)-(9) of kernels/README.md, as C++ kernels.

Shapes   as in ``attention``; the last axis of an operand is made dense if it is not.
Dtypes   float32, float64, and bfloat16, which is read and written as such and computed in float32.
Bits     a (sample, key head) pair belongs to one thread: the same on any number of threads.
Memory   a thread keeps its scratch for later calls: keys, values and sums of a pair, and tiles of 512 KiB in all.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...common.dtypes import accumulation_dtype
from ...common.forks import kernel_threads
from ..runtime.cpp_library import library

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


def runs(q: Tensor, mask_gradient: bool = False) -> bool:
    """Whether there is a native kernel; there is none for a mask's gradient, nor for float16."""
    known = q.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return known and not mask_gradient and library("attention") is not None


def call(
    rung: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    softmax: Tensor,
    is_causal: bool,
    scale: float,
    **tensors: Tensor | None,
) -> None:
    """Run a rung; ``tensors`` are its other operands and its results, by the names in ``_TENSORS``.

    ``softmax`` is (1a) in the accumulation dtype, and dense where it is a result.
    """
    given = {"q": q, "k": k, "v": v, **tensors}
    dense = {name: _dense(x) for name, x in given.items() if x is not None}  # alive until the end
    softmax = softmax.contiguous()
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(accumulation_dtype(q.dtype))
    (B, H, Nq, d), (_, Hkv, Nk, dv) = q.shape, v.shape
    sizes = (B, H, Hkv, Nq, Nk, d, dv, is_causal, kernel_threads())
    request = _Call(
        **dict(zip(_SIZES, sizes, strict=True)),
        scale=scale,
        mask=_described(mask),
        softmax=softmax.data_ptr(),
        **{name: _Tensor(x.data_ptr(), (_Int * 3)(*x.stride()[:3])) for name, x in dense.items()},
    )
    functions: Any = library("attention")
    kind = str(q.dtype).removeprefix("torch.")
    functions[f"attention_{rung}_{kind}"](ctypes.byref(request))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _described(mask: Tensor | None) -> _Mask:
    """Strides of 0 where the mask is broadcast."""
    if mask is None:
        return _Mask()
    strides = (0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
    return _Mask(mask.data_ptr(), (_Int * 4)(*strides), 1 if mask.dtype == torch.bool else 2)
