"""Whether products of half operands are faster than those of float32 here."""

import torch


def narrow_products(dtype: torch.dtype) -> bool:
    """For bfloat16 on a processor that multiplies it (AVX-512 BF16, AMX, Arm BF16)."""
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
