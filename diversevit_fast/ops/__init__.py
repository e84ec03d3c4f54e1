"""Twice-differentiable operators: contracts, derivative ladders and argument checks. No kernels."""

from .attention import attention
from .gelu import gelu
from .head_penalty import head_penalty
from .layer_norm import layer_norm
from .routed_head_penalty import routed_head_penalty

__all__ = ["attention", "gelu", "head_penalty", "layer_norm", "routed_head_penalty"]
