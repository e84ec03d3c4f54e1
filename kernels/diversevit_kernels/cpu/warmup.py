"""Every formula that this backend compiles, compiled ahead of the first call."""

import torch

from . import attention_rows, gelu
from . import layer_norm_formulas as layer_norm
from .inductor import compiled

FORMULAS = (
    *(attention_rows.FORWARD, attention_rows.BACKWARD, attention_rows.DOUBLE_BACKWARD),
    *(layer_norm.DOUBLE_BACKWARD_ROWS, layer_norm.DOUBLE_BACKWARD_COLUMNS),
    *gelu.DOUBLE_BACKWARD.values(),
)
HALF = (layer_norm.BACKWARD_ROWS, layer_norm.BACKWARD_COLUMNS)
"""Of half types alone."""


def warmup(dtype: torch.dtype) -> list[str]:
    """Names of the formulas that are now compiled for tensors of ``dtype``."""
    chosen = FORMULAS if dtype == torch.float32 else (*FORMULAS, *HALF)
    return [one.name for one in chosen if compiled(one, dtype) is not None]
