"""LayerNorm on a GPU: forward, backward, double backward."""

from .kernels import layer_norm_backward, layer_norm_double_backward, layer_norm_forward

__all__ = ["layer_norm_backward", "layer_norm_double_backward", "layer_norm_forward"]
