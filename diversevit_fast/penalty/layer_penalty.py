"""The penalty of attention layers, from the gradients of their heads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attachment.attention_modules import AttentionLayer
from ..ops import head_penalty, routed_head_penalty
from .batch_checks import check_reached
from .captured import Captured
from .head_gradients import HeadGradients
from .input_projections import ProjectionOutput


class LayerPenalties:
    """The penalties of runs of attention layers, computed in any order, and their mean.

    Args:
        runs: of all layers, in the order in which they ran.
        layers: each has to have a run with a gradient.
        granularity, reduction: as for ``HeadDiversity``.
    """

    def __init__(
        self,
        runs: Sequence[Captured],
        layers: Sequence[AttentionLayer],
        granularity: str,
        reduction: str,
    ):
        self._runs, self._layers = runs, layers
        self._kind = granularity, reduction
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, i: int, grads: HeadGradients, scale: float) -> None:
        """Compute the penalty of run ``i`` from its gradients times ``scale``, again if they are other ones."""
        self._found[i] = layer_penalty(grads, self._runs[i], *self._kind, scale)

    def take(self, i: int, value: Tensor, cosines: Tensor) -> None:
        """Take the penalty of run ``i`` that a block computed."""
        self._found[i] = value, cosines

    def mean(self) -> tuple[Tensor, list[Tensor]]:
        """The mean over layers of their penalties, each the mean over the samples of its runs.

        Returns:
            The scalar penalty, and each layer's detached cosines, of its last run.

        Raises:
            UsageError: a layer has no gradient.
        """
        values: dict[int, list[tuple[Tensor, int]]] = {layer.index: [] for layer in self._layers}
        cosines: dict[int, Tensor] = {}
        for i in sorted(self._found):
            (value, cosine), run = self._found[i], self._runs[i]
            values[run.layer].append((value, run.samples))
            cosines[run.layer] = cosine.detach()
        check_reached(self._layers, cosines)
        of_layers = [_mean(of_layer) for of_layer in values.values()]
        mean = of_layers[0] if len(of_layers) == 1 else torch.stack(of_layers).mean()
        return mean, [cosines[i] for i in values]


def _mean(values: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The mean of values weighted by numbers of samples; of one value itself, without a launch."""
    if len(values) == 1:
        return values[0][0]
    return torch.stack([value * n for value, n in values]).sum() / sum(n for _, n in values)


def layer_penalty(
    grads: HeadGradients,
    captured: Captured,
    granularity: str,
    reduction: str,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The penalty (scalar) and cosines of one run; ``grads`` are its gradients times ``scale``."""
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

    Both are views where one projection makes all three. Else they are joined from the projections', with
    zeros for queries that are made of another tensor than the layer's input.
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
        query = F.pad(query, (0, 0, 0, 0, 0, rest))
    value, value_weight = made["v"]
    weights = torch.stack([query_weight, key_weight, value_weight])
    return torch.stack([query, key, value], 2), weights


def _by_head(grad: Tensor | None, part: ProjectionOutput, heads: int) -> tuple[Tensor, Tensor]:
    """The gradient ``[B, N, roles, H, d]`` and weight ``[roles, H, d, D]`` of one projection."""
    roles = len(part.roles)
    grad = torch.zeros_like(part.tensor) if grad is None else grad
    before = len(part.weight) - part.rows
    grad, weight = (grad[..., before:], part.weight[before:]) if before else (grad, part.weight)
    if part.by_head:
        return grad, weight.view(roles, heads, -1, weight.shape[-1])
    if grad.ndim == 2:  # the first token alone
        grad = grad.unsqueeze(1)
    elif grad.ndim > 3:  # tokens on a grid
        grad = grad.flatten(1, -2)
    return grad.unflatten(-1, (roles, heads, -1)), weight.unflatten(0, (roles, heads, -1))
