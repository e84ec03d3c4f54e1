"""The options that flash-attn's functions have in common, as masks of ours."""

import torch
from torch import Tensor

from ..errors import UnsupportedError, usage_error

Window = tuple[int, int]


def check_slopes(slopes: Tensor | None, samples: int, heads: int) -> None:
    """Raise a UsageError unless there is a slope per head, or per sample and head."""
    if slopes is not None and slopes.shape not in ((heads,), (samples, heads)):
        wanted = f"[{heads}] or [{samples}, {heads}]"
        raise usage_error("alibi_slopes", wanted, list(slopes.shape), "one per head")


def refuse(softcap: float, return_attn_probs: bool) -> None:
    """Raise an UnsupportedError for options that have no operator."""
    if softcap:
        raise UnsupportedError(f"softcap: not supported, got {softcap}; pass 0.0")
    if return_attn_probs:
        raise UnsupportedError("return_attn_probs: not supported; pass False")


def attention_mask(
    q: Tensor, keys: int, causal: bool, window: Window, slopes: Tensor | None
) -> tuple[Tensor | None, bool]:
    """The mask of queries ``[B, Nq, H, d]``, and whether it is causal without one.

    ``[Nq, Nk]``, or with slopes ``[B or 1, H, Nq, Nk]``.
    """
    queries = q.shape[1]
    left, right = window
    right = 0 if causal else right
    if slopes is None and left < 0 and (right < 0 or (right == 0 and queries == keys)):
        return None, right == 0
    place = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
    distance = torch.arange(keys, device=q.device) - place
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    if slopes is None:
        return seen, False
    check_slopes(slopes, q.shape[0], q.shape[2])
    bias = -slopes.detach()[..., None, None] * distance.abs()
    bias = bias.masked_fill(~seen, -torch.inf)
    return (bias if slopes.ndim == 2 else bias[None]), False
