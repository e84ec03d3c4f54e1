"""Every formula that this backend compiles, compiled ahead of the first call."""

import torch

from . import gelu, layer_norm
from .inductor import compiled

FORMULAS = (layer_norm.DOUBLE_BACKWARD, *gelu.DOUBLE_BACKWARD.values())


def warmup(dtype: torch.dtype) -> list[str]:
    """Names of the formulas that are now compiled for ``dtype``."""
    return [one.name for one in FORMULAS if compiled(one, dtype) is not None]
