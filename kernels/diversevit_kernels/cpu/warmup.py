"""Everything that this backend compiles, compiled ahead of the first call."""

import torch

from . import attention_rows, gelu
from . import layer_norm_formulas as layer_norm
from .inductor import compiled
from .native import library

FORMULAS = (
    *(attention_rows.FORWARD, attention_rows.BACKWARD, attention_rows.DOUBLE_BACKWARD),
    *(layer_norm.DOUBLE_BACKWARD_ROWS, layer_norm.DOUBLE_BACKWARD_COLUMNS),
    *gelu.DOUBLE_BACKWARD.values(),
)
HALF = (layer_norm.BACKWARD_ROWS, layer_norm.BACKWARD_COLUMNS)
"""Of half types alone."""


def warmup(dtype: torch.dtype) -> list[str]:
    """Names of the kernels and formulas that are now compiled for tensors of ``dtype``."""
    native = ["attention"] if dtype != torch.float16 and library("attention") is not None else []
    chosen = FORMULAS if dtype == torch.float32 else (*FORMULAS, *HALF)
    return native + [one.name for one in chosen if compiled(one, dtype) is not None]
