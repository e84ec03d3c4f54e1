"""From a prediction to the gradients of its attention heads, all heads of all layers at once.

``wrt="output"``: g_h = dp*/do_h, the gradient of the head's output. ``wrt="input"``: u_h = (do_h/dx)^T g_h,
what the head alone reads from its layer's input; it factors as u_h = r_h W_h with r_h the gradient of
the head's slice of the qkv projection's output, so one backward pass gives every head (method.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UsageError, usage_error
from ..ops import head_penalty, routed_head_penalty

Target = Literal["logit", "probability"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ProjectionOutput:
    """The output of a linear layer that makes queries, keys or values, ``[B, N, len(roles) H d]``.

    ``roles`` are some of "qkv", in this order; they are made by the last len(roles) H d rows of
    ``weight``, H d being those of a whole ``[B, H, N, d]``. ``[B, H d]``: of the first token alone.
    """

    tensor: Tensor
    roles: str
    weight: Tensor
    rows: int  # len(roles) H d


@dataclass(frozen=True)
class Captured:
    """What one run of one attention layer left behind for the penalty.

    ``heads``: the head output ``[B, H, n, d]``, or None where the gradient of the layer's input is asked
    for, which comes from ``projections``. ``tokens`` is N; n < N when only the first n query tokens were
    computed: the others have zero gradient.
    """

    layer: int
    num_heads: int
    tokens: int
    heads: Tensor | None = None
    projections: tuple[ProjectionOutput, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """What to differentiate with respect to."""
        return [part.tensor for part in self.projections] if self.heads is None else [self.heads]


def check_target(target: Target) -> None:
    """Raise a UsageError unless ``target`` is one that ``prediction_score`` takes."""
    if not callable(target) and target not in ("logit", "probability"):
        wanted = "'logit', 'probability' or a callable"
        raise usage_error("target", wanted, repr(target), "check the spelling")


def prediction_score(logits: Tensor, target: Target) -> Tensor:
    """Per-sample scores ``[B]`` of logits ``[B, classes]``, whose gradients are regularised.

    Args:
        target: ``"logit"``: each sample's largest logit (the paper's p*). ``"probability"``: its
            largest softmax probability. A callable gets the logits and returns ``[B]``.

    Raises:
        UsageError: logits of another shape, without a graph, or not finite (not looked at inside ``torch.compile``
            or a CUDA graph); a bad target.
    """
    check_logits(logits)
    if _may_be_read(logits) and not torch.isfinite(logits).all():
        hint = "lower the learning rate or the penalty's weight, or scale the loss"
        raise usage_error("logits", "finite values", "NaN or infinity", hint)
    if not callable(target):
        return (logits if target == "logit" else logits.softmax(-1)).max(-1).values
    score = target(logits)
    if not isinstance(score, Tensor) or score.shape != logits.shape[:1]:
        got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise usage_error(
            "target", f"a callable returning [{len(logits)}]", got, "one score a sample"
        )
    return score


def _may_be_read(x: Tensor) -> bool:
    """Whether values may steer Python: not in a graph, Dynamo's or CUDA's."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return not torch.compiler.is_compiling() and not capturing


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


HeadGradients = list[Tensor | None]
"""Of one ``Captured``'s tensors; None where there is no path."""


def head_gradients(
    score: Tensor, captured: Sequence[Captured], scale: float = 1.0
) -> list[HeadGradients]:
    """d sum(scale * score) / d of every captured tensor, from one backward pass."""
    create_graph = torch.is_grad_enabled()
    total = score.sum() if scale == 1 else score.sum() * scale
    tensors = [x for c in captured for x in c.tensors]
    grads = torch.autograd.grad(
        total, tensors, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    rest = iter(grads)
    return [[next(rest) for _ in c.tensors] for c in captured]


def layer_penalty(
    grads: HeadGradients,
    captured: Captured,
    granularity: str,
    reduction: str,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One layer's penalty (scalar) and cosines, from the gradients of what was captured, times ``scale``."""
    kind: dict[str, Any] = {"granularity": granularity, "reduction": reduction}
    kind |= {"eps": 1e-12 * scale, "return_cosines": True}
    if captured.heads is not None:
        (grad,) = grads
        assert grad is not None
        rows = grad.shape[2] / captured.tokens if granularity == "token" else 1.0
        value, cosines = head_penalty(grad, **kind)
        return value * rows, cosines
    grad, weight = _routed(grads, captured)
    return routed_head_penalty(grad, weight.to(grad.dtype), **kind)  # pyright: ignore[reportReturnType]


def _routed(grads: HeadGradients, captured: Captured) -> tuple[Tensor, Tensor]:
    """The gradient of q, k and v ``[B, N, 3, H, d]`` and their weight ``[3, H, d, D]``.

    What one layer made in one product is a view; else the parts are joined, with zeros for queries that
    read another tensor than the layer's input.
    """
    heads = captured.num_heads
    if len(captured.projections) == 1 and captured.projections[0].roles == "qkv":
        return _by_head(grads[0], captured.projections[0], heads)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for grad, part in zip(grads, captured.projections, strict=True):
        values, weight = _by_head(grad, part, heads)
        for place, role in enumerate(part.roles):
            made[role] = values[:, :, place], weight[place]
    key, key_weight = made["k"]
    query, query_weight = made.get("q", (key.new_zeros(()).expand_as(key), key_weight))
    if query.shape[1] < key.shape[1]:
        rest = key.shape[1] - query.shape[1]
        query = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, rest))
    value, value_weight = made["v"]
    weights = torch.stack([query_weight, key_weight, value_weight])
    return torch.stack([query, key, value], 2), weights


def _by_head(grad: Tensor | None, part: ProjectionOutput, heads: int) -> tuple[Tensor, Tensor]:
    """A projection's gradient ``[B, N, roles, H, d]`` and its weight ``[roles, H, d, D]``."""
    roles = len(part.roles)
    grad = torch.zeros_like(part.tensor) if grad is None else grad
    before = len(part.weight) - part.rows
    grad, weight = (grad[..., before:], part.weight[before:]) if before else (grad, part.weight)
    grad = grad.unsqueeze(1) if grad.ndim == 2 else grad.flatten(1, -2) if grad.ndim > 3 else grad
    return grad.unflatten(-1, (roles, heads, -1)), weight.unflatten(0, (roles, heads, -1))


def unreached(layers: Sequence[str]) -> UsageError:
    """The error for logits that do not depend on what the context captured."""
    return usage_error(
        "logits",
        "logits computed under this context",
        f"logits that do not depend on {', '.join(layers)}",
        "pass the output of the forward run inside the last `with` block",
    )
