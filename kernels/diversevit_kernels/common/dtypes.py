"""The dtype that every backend computes statistics in."""

import torch


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of statistics, sums and accumulators for operands of ``dtypes``: float64 if one is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
