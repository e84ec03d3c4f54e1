"""Twice-differentiable operators: schemas, derivatives and argument checks. No kernels."""

from .attention import attention
from .attention_qkvpacked import attention_qkvpacked
from .gelu import gelu
from .head_penalty import head_penalty
from .layer_norm import layer_norm
from .routed_head_penalty import routed_head_penalty

__all__ = [
    "attention",
    "attention_qkvpacked",
    "gelu",
    "head_penalty",
    "layer_norm",
    "routed_head_penalty",
]
