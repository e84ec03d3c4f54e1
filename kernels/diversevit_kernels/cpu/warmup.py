"""Compile everything that the CPU backend compiles, ahead of its first use."""

import torch

from .attention import formulas
from .runtime.cpp_library import library
from .runtime.inductor import compiled

FORMULAS = (formulas.FORWARD, formulas.BACKWARD, formulas.DOUBLE_BACKWARD)
KERNELS = ("attention", "gelu", "layer_norm", "routed_head_penalty")


def warmup(dtype: torch.dtype) -> list[str]:
    """Compile for tensors of ``dtype``; return the names of the C++ kernels and formulas that are ready."""
    kernels = ("attention",) if dtype == torch.float16 else KERNELS  # the others have no float16
    native = [name for name in kernels if library(name) is not None]
    return native + [one.name for one in FORMULAS if compiled(one, torch.float32) is not None]
