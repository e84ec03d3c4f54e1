"""The prediction that the penalty differentiates: one score per sample, from the logits."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..errors import usage_error

Target = Literal["logit", "probability"] | Callable[[Tensor], Tensor]


def check_target(target: Target) -> None:
    """Raise a UsageError unless ``target`` is one that ``prediction_score`` takes."""
    if not callable(target) and target not in ("logit", "probability"):
        wanted = "'logit', 'probability' or a callable"
        raise usage_error("target", wanted, repr(target), "check the spelling")


def prediction_score(logits: Tensor, target: Target) -> tuple[Tensor, Tensor | None]:
    """What is differentiated, from logits ``[B, classes]``: the scores ``[B]`` of samples, or a weighted sum.

    The largest logits are the logits weighted by ones in their places: the gradient of that is the weights.

    Returns:
        The scores and None, or the logits and their weights.

    Args:
        target: ``"logit"``: each sample's largest logit (the paper's p*). ``"probability"``: its
            largest softmax probability. A callable gets the logits and returns ``[B]``.

    Raises:
        UsageError: logits of another shape, or without a graph; a bad target.
    """
    check_logits(logits)
    if not callable(target):
        if target == "probability":
            return logits.softmax(-1).max(-1).values, None
        largest = logits.detach().max(-1, keepdim=True).indices
        return logits, torch.zeros_like(logits).scatter_(-1, largest, 1.0)
    score = target(logits)
    if not isinstance(score, Tensor) or score.shape != logits.shape[:1]:
        got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise usage_error(
            "target", f"a callable returning [{len(logits)}]", got, "one score a sample"
        )
    return score, None


def check_logits(logits: Tensor) -> None:
    """Raise a UsageError unless ``logits`` are ``[B, classes]`` with a graph; reads no value."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise usage_error(
            "logits", "floating [B, classes]", got, "pass the model's output as it is"
        )
    if not logits.requires_grad:
        hint = "run the model inside the `with` block, without no_grad or inference_mode"
        raise usage_error("logits", "a tensor with a graph", "one without", hint)
