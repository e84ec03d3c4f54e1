"""Attention on a GPU to second order: forward, backward and double backward, a file for each.

``tiles`` holds what the kernels share; equations (1)-(9) of kernels/README.md.
"""

from torch import Tensor

from ..runtime.copies import write
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


def attention_empty_qkv(qkv: Tensor, queries: int) -> Tensor:
    """Dense, like ``qkv`` [B, N, 3, H, d]: what ``into`` may be views of; zero where some tokens are no queries."""
    made = allocate(tuple(qkv.shape), qkv.dtype, qkv)
    return made if queries == qkv.shape[1] else write(made, 0.0)
