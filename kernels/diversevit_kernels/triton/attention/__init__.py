"""Attention on a GPU to second order: forward, backward and double backward, a file for each.

``tiles`` holds what the kernels share; equations (1)-(9) of kernels/README.md.
"""

from torch import Tensor

from ..runtime.tensors import allocate
from .backward import attention_backward
from .double_backward import attention_double_backward
from .forward import attention_forward

__all__ = [
    "attention_backward",
    "attention_double_backward",
    "attention_empty_qkv",
    "attention_forward",
]


def attention_empty_qkv(qkv: Tensor) -> Tensor:
    """Uninitialised, dense, like ``qkv`` [B, N, 3, H, d]: what ``into`` may be views of."""
    return allocate(tuple(qkv.shape), qkv.dtype, qkv)
