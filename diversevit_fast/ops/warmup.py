"""Compile CPU kernels ahead of the first large call, which would otherwise wait for them."""

import torch

from ..errors import usage_error
from .backends import compile_ahead

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def warmup(*dtypes: torch.dtype) -> dict[torch.dtype, list[str]]:
    """Compile the CPU kernels of attention, layer_norm, gelu and routed_head_penalty, or load them from disk.

    Without this call the first use of each kernel compiles it: some seconds the first time on a machine, milliseconds
    from then on. Compiled kernels are stored in ``diversevit`` in the user's cache folder (``XDG_CACHE_HOME``, else
    ``~/.cache``), or in ``DIVERSEVIT_CACHE_DIR``, and only where nobody else can write. Inductor also compiles three
    formulas of attention for each dtype, for masks whose gradient is asked for and for float16. GPU kernels are
    compiled by Triton when they are first launched, with a cache of its own.

    Args:
        dtypes: of float32, bfloat16 and float16; none: float32 and bfloat16.

    Returns:
        Names of the compiled kernels and formulas by dtype. Where none can be compiled (no C++ compiler) there is one
        warning, the list is empty, and the operators run a slower path.

    Raises:
        UsageError: another dtype.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            known = ", ".join(str(one) for one in DTYPES)
            raise usage_error(
                "warmup", f"one of {known}", str(dtype), "name a dtype that is compiled"
            )
    chosen = dtypes or (torch.float32, torch.bfloat16)
    return {dtype: compile_ahead(dtype) for dtype in chosen}
