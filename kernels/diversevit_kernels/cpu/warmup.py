"""Everything that this backend compiles, compiled ahead of the first call."""

import torch

from .attention import formulas as attention_rows
from .runtime.inductor import compiled
from .runtime.native import library

FORMULAS = (attention_rows.FORWARD, attention_rows.BACKWARD, attention_rows.DOUBLE_BACKWARD)
KERNELS = ("attention", "gelu", "layer_norm", "routed_head_penalty")


def warmup(dtype: torch.dtype) -> list[str]:
    """Names of the kernels and formulas that are now compiled for tensors of ``dtype``."""
    native = (
        [] if dtype == torch.float16 else [name for name in KERNELS if library(name) is not None]
    )
    return native + [one.name for one in FORMULAS if compiled(one, torch.float32) is not None]
