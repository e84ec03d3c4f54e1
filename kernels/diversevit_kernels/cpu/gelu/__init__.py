"""GELU on a CPU: forward, backward, double backward."""

from .dispatch import gelu_backward, gelu_double_backward, gelu_forward

__all__ = ["gelu_backward", "gelu_double_backward", "gelu_forward"]
