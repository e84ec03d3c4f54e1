"""From a prediction to the gradients of its attention heads, all heads of all layers at once.

``wrt="output"``: g_h = dp*/do_h, the gradient of the head's output. ``wrt="input"``: u_h = (do_h/dx)^T g_h,
what the head alone reads from its layer's input; it factors as u_h = r_h W_h with r_h the gradient of
the head's slice of the qkv projection's output, so one backward pass gives every head (method.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import UsageError, expected
from .ops import head_penalty, routed_head_penalty

Target = Literal["logit", "probability"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Captured:
    """What one run of one attention layer left behind for the penalty.

    ``weight_qkv`` None: ``tensor`` is the head output ``[B, H, n, d]``. Else ``tensor`` is the qkv
    projection's output ``[B, N, 3 H d]`` and ``weight_qkv`` its weight ``[3, H, d, D]``. ``tokens`` is N;
    n < N when only the first n query tokens were computed: the others have zero gradient.
    """

    layer: int
    tensor: Tensor
    tokens: int
    weight_qkv: Tensor | None = None


def check_target(target: Target) -> None:
    """Raise a UsageError unless ``target`` is one that ``prediction_score`` takes."""
    if not callable(target) and target not in ("logit", "probability"):
        wanted = "'logit', 'probability' or a callable"
        raise expected("target", wanted, repr(target), "check the spelling")


def prediction_score(logits: Tensor, target: Target) -> Tensor:
    """Per-sample scores ``[B]`` of logits ``[B, classes]``, whose gradients are regularised.

    Args:
        target: ``"logit"``: each sample's largest logit (the paper's p*). ``"probability"``: its
            largest softmax probability. A callable gets the logits and returns ``[B]``.

    Raises:
        UsageError: logits of another shape, without a graph, or not finite; a bad target.
    """
    check_logits(logits)
    if not torch.compiler.is_compiling() and not torch.isfinite(logits).all():
        cure = "lower the learning rate or the penalty's weight, or scale the loss"
        raise expected("logits", "finite values", "NaN or infinity", cure)
    if not callable(target):
        return (logits if target == "logit" else logits.softmax(-1)).max(-1).values
    score = target(logits)
    if not isinstance(score, Tensor) or score.shape != logits.shape[:1]:
        got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise expected("target", f"a callable returning [{len(logits)}]", got, "one score a sample")
    return score


def check_logits(logits: Tensor) -> None:
    """Raise a UsageError unless ``logits`` are ``[B, classes]`` with a graph; reads no value."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise expected("logits", "floating [B, classes]", got, "pass the model's output as it is")
    if not logits.requires_grad:
        cure = "run the model inside the `with` block, without no_grad or inference_mode"
        raise expected("logits", "a tensor with a graph", "one without", cure)


def head_gradients(score: Tensor, captured: Sequence[Captured]) -> list[Tensor | None]:
    """d sum(score) / d captured.tensor, from one backward pass; None where there is no path."""
    create_graph = torch.is_grad_enabled()
    tensors = [c.tensor for c in captured]
    grads = torch.autograd.grad(
        score.sum(), tensors, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return list(grads)


def layer_penalty(
    grad: Tensor, captured: Captured, granularity: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """One layer's penalty (scalar) and cosines, from the gradient of what was captured."""
    if captured.weight_qkv is None:
        rows = grad.shape[2] / captured.tokens if granularity == "token" else 1.0
        value, cosines = head_penalty(
            grad, granularity=granularity, reduction=reduction, return_cosines=True
        )
        return value * rows, cosines
    _, heads, width, _ = captured.weight_qkv.shape
    value, cosines = routed_head_penalty(
        grad.unflatten(-1, (3, heads, width)),
        captured.weight_qkv.to(grad.dtype),
        granularity=granularity,
        reduction=reduction,
        return_cosines=True,
    )
    return value, cosines


def unreached(layers: Sequence[str]) -> UsageError:
    """The error for logits that do not depend on what the context captured."""
    return expected(
        "logits",
        "logits computed under this context",
        f"logits that do not depend on {', '.join(layers)}",
        "pass the output of the forward run inside the last `with` block",
    )
