"""LayerNorm on a CPU: forward, backward, double backward."""

from .dispatch import layer_norm_backward, layer_norm_double_backward, layer_norm_forward

__all__ = ["layer_norm_backward", "layer_norm_double_backward", "layer_norm_forward"]
