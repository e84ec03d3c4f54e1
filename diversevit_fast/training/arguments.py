"""Checks of ``graph_step``'s arguments: each returns what it was given, or raises a one-line ``UsageError``."""

from typing import Any

import torch

from ..errors import usage_error
from ..penalty.head_diversity import HeadDiversity


def checked_diversity(diversity: Any) -> HeadDiversity | None:
    """A ``HeadDiversity`` or None."""
    if diversity is not None and not isinstance(diversity, HeadDiversity):
        hint = "the one that the loss enters"
        raise usage_error("diversity", "a HeadDiversity or None", type(diversity).__name__, hint)
    return diversity


def checked_amp(amp: Any) -> torch.dtype | None:
    """A dtype of autocast or None."""
    if amp not in (None, torch.float16, torch.bfloat16):
        wanted = "torch.bfloat16, torch.float16 or None"
        raise usage_error("amp", wanted, amp, "it is the dtype of autocast")
    return amp


def checked_clip(clip: Any) -> float | None:
    """A positive number or None."""
    number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    if clip is not None and not (number and clip > 0):
        raise usage_error("clip", "a positive number or None", repr(clip), "it is a norm")
    return clip


def checked_scaler(scaler: Any) -> torch.amp.GradScaler | None:
    """A ``GradScaler`` that is enabled, or None."""
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        got = type(scaler).__name__
        raise usage_error("scaler", "a torch.amp.GradScaler or None", got, "leave it out")
    return scaler if scaler is not None and scaler.is_enabled() else None


def checked_count(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        wanted = "a whole number of at least 1"
        raise usage_error(name, wanted, repr(value), "leave it out")
    return value


def checked_weight(weight: Any) -> Any:
    """A function or None."""
    if weight is not None and not callable(weight):
        hint = "a constant weight belongs into the loss"
        raise usage_error("weight", "a function of no arguments or None", repr(weight), hint)
    return weight
