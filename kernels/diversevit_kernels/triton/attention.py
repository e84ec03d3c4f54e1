"""Attention on a GPU to second order: the three functions of the stage, a file for each.

``attention_tiles`` holds what the kernels share; equations (1)-(9) of kernels/README.md.
"""

from .attention_backward import attention_backward
from .attention_double_backward import attention_double_backward
from .attention_forward import attention_forward

__all__ = ["attention_backward", "attention_double_backward", "attention_forward"]
