"""Taking heads away: by multiplying their outputs with zero, or for good.

The heads that stay are multiplied by H / kept, as published, so that the layer's output keeps its
scale; ``rescale=False`` leaves them alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attach import Attachment, Forward
from .attention_modules import (
    HEAD_COUNTS,
    AttentionLayer,
    Projection,
    attention_layers,
    layer_index,
)
from .errors import expected
from .parallel import unwrapped
from .support import refuse

Kept = Mapping[int, Sequence[int]]


class keep_heads(Attachment):  # noqa: N801 (a verb, like torch.no_grad)
    """Context manager: in the layers named, heads not listed are multiplied by zero.

    >>> with keep_heads(model, {-1: [2]}):        # only head 2 of the last layer
    ...     logits = model(images)

    Args:
        model: as in ``HeadDiversity``.
        heads: for each layer index (negative allowed), the heads that stay; other layers keep all.
        rescale: multiply the heads that stay by H / kept.

    Raises:
        UsageError: a layer or head that does not exist, or an empty selection.
        UnsupportedError: a layer's heads cannot be seen (its attention is no call of
            ``F.scaled_dot_product_attention``).
    """

    def __init__(self, model: nn.Module, heads: Kept, rescale: bool = True):
        model = unwrapped(model)
        kept = check_kept(model, heads)
        super().__init__(model, [layer for layer, _ in kept])
        refuse(self.layers, "mask")
        self._scale = {layer.index: head_scale(layer, which, rescale) for layer, which in kept}

    def attended(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        heads = attend(*qkv, **options)
        return heads * self._scale[layer.index].to(heads)[:, None, None]


def check_kept(model: nn.Module, heads: Kept) -> list[tuple[AttentionLayer, list[int]]]:
    """The layers named and their heads to keep, sorted and validated, in the model's order."""
    every = attention_layers(model)
    if not isinstance(heads, Mapping) or not heads:
        raise expected("heads", "a dictionary {layer: [heads]}", repr(heads), "name a layer")
    kept: dict[int, list[int]] = {}
    for index, which in heads.items():
        layer = every[layer_index(index, len(every))]
        wanted = f"a list of different heads from 0 to {layer.num_heads - 1} for layer {index}"
        numbers = [h for h in which if isinstance(h, int) and 0 <= h < layer.num_heads]
        if not numbers or len(set(numbers)) < len(which):
            raise expected("heads", wanted, list(which), "keep at least one")
        if layer.index in kept:
            raise expected("heads", "each layer once", list(heads), "remove the repetition")
        kept[layer.index] = sorted(numbers)
    return [(every[index], kept[index]) for index in sorted(kept)]


def head_scale(layer: AttentionLayer, kept: Sequence[int], rescale: bool) -> Tensor:
    """``[H]``: zero for the heads that go, 1 or H / kept for those that stay."""
    scale = torch.zeros(layer.num_heads, dtype=torch.float64)
    scale[list(kept)] = layer.num_heads / len(kept) if rescale else 1.0
    return scale


def prune_heads(model: nn.Module, heads: Kept, rescale: bool = True) -> nn.Module:
    """Remove the heads not listed: same outputs as ``keep_heads``, smaller, saved as any model.

    The layer's projections lose the rows and its output projection the columns of the heads that go; H /
    kept is folded into the latter. The model is changed in place, entirely or, if an argument is
    wrong, not at all; each pruned layer's ``kept_heads`` says which of its ``original_heads`` are left.
    ``save_pruned`` and ``load_pruned`` keep it in a file.

    Args:
        model, heads, rescale: as in ``keep_heads``.

    Returns:
        ``model``.

    Raises:
        UsageError: a layer or head that does not exist, or an empty selection.
        UnsupportedError: the module's own forward does not allow fewer heads, or something in it mixes
            heads (timm's ``scale_norm``, ``gated``); ``keep_heads`` masks them.
    """
    kept = check_kept(model, heads)
    refuse([layer for layer, _ in kept], "prune")
    for layer, which in kept:
        _remove(layer, which, rescale)
    return model


@torch.no_grad()
def _remove(layer: AttentionLayer, kept: list[int], rescale: bool) -> None:
    module, heads = layer.module, layer.num_heads
    factor = heads / len(kept) if rescale else 1.0
    original = getattr(module, "kept_heads", tuple(range(heads)))
    for projection in layer.projections:
        _shrink_projection(projection, heads, kept)
    output: Any = layer.output
    output.weight = _like(output.weight, _channels(output.weight, heads, kept, 1) * factor)
    output.in_features = output.weight.shape[1]
    for name in HEAD_COUNTS:
        if hasattr(module, name):
            setattr(module, name, len(kept))
    module.original_heads = getattr(module, "original_heads", heads)
    module.kept_heads = tuple(original[h] for h in kept)
    width = output.in_features
    for name in ("attn_dim", "kv_dim"):  # timm's
        if hasattr(module, name):
            setattr(module, name, width)
    if hasattr(module, "num_kv_heads"):
        module.num_kv_heads = len(kept)


def _shrink_projection(projection: Projection, heads: int, kept: list[int]) -> None:
    linear: Any = projection.owner
    groups = len(projection.roles) * heads
    rows = [role * heads + h for role in range(len(projection.roles)) for h in kept]
    linear.weight = _like(linear.weight, _channels(linear.weight, groups, rows, 0))
    if linear.bias is not None:
        linear.bias = _like(linear.bias, _channels(linear.bias, groups, rows, 0))
    linear.out_features = len(linear.weight)


def _channels(x: Tensor, groups: int, kept: list[int], dim: int) -> Tensor:
    """``x`` whose axis ``dim`` is so many equal groups, with those kept."""
    chosen = torch.tensor(kept, device=x.device)
    return x.unflatten(dim, (groups, -1)).index_select(dim, chosen).flatten(dim, dim + 1)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.clone(), requires_grad=old.requires_grad)
