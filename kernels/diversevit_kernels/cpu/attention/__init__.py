"""Attention on a CPU: forward, backward, double backward."""

from .dispatch import (
    attention_backward,
    attention_double_backward,
    attention_empty_qkv,
    attention_forward,
)

__all__ = [
    "attention_backward",
    "attention_double_backward",
    "attention_empty_qkv",
    "attention_forward",
]
