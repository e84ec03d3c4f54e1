"""GELU on a GPU: forward, backward, double backward."""

from .kernels import gelu_backward, gelu_double_backward, gelu_forward

__all__ = ["gelu_backward", "gelu_double_backward", "gelu_forward"]
