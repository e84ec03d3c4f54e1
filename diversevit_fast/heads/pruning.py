"""Mask heads (multiply their outputs by zero) or prune them (remove their weights).

The heads that stay are multiplied by H / kept, as published, so that the layer's output keeps its scale;
``rescale=False`` leaves them unscaled.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment.attachment import Attachment, Forward
from ..attachment.attention_modules import (
    HEAD_COUNTS,
    AttentionLayer,
    Projection,
    attention_layers,
    layer_index,
)
from ..attachment.indices import Integers, as_list, describe, is_boolean, whole_number
from ..attachment.parallel import is_ddp, unwrap
from ..attachment.support import refuse
from ..attachment.torch_calls import open_attachments
from ..errors import UnsupportedError, usage_error
from .module_swap import Change, replaced_parameters, swap, warn_of_optimizers

Heads = Mapping[Any, Integers]
"""The heads that stay by layer index, as users pass them."""
Kept = Mapping[int, Sequence[int]]
"""The same after ``check_kept``."""


class keep_heads(Attachment):  # noqa: N801 (a verb, like torch.no_grad)
    """Context manager that multiplies the heads not listed by zero, in the layers named.

    >>> with keep_heads(model, {-1: [2]}):        # only head 2 of the last layer
    ...     logits = model(images)

    Args:
        model: as in ``HeadDiversity``.
        heads: for each layer index (negative allowed), the numbers of the heads that stay; other layers
            keep all. Integers of any kind in any collection (list, set, range, array, tensor,
            generator), or one alone; booleans are refused: they would be a mask.
        rescale: multiply the heads that stay by H / kept.

    Raises:
        UsageError: a layer or head that does not exist, or an empty selection; in a forward, a layer pruned
            since.
        UnsupportedError: a layer's heads cannot be seen (its attention is no call of
            ``F.scaled_dot_product_attention``).
    """

    def __init__(self, model: nn.Module, heads: Heads, rescale: bool = True):
        model = unwrap(model)
        kept = check_kept(model, heads)
        super().__init__(model, [layer for layer, _ in kept])
        refuse(self.layers, "mask")
        self._scale = {layer.index: head_scale(layer, which, rescale) for layer, which in kept}

    def on_attention(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        heads, scale = attend(*qkv, **options), self._scale[layer.index]
        if heads.shape[1] != len(scale):
            wanted = f"the {len(scale)} heads that {layer.name} had"
            raise usage_error("model", wanted, heads.shape[1], "make keep_heads after pruning")
        return heads * scale.to(heads)[:, None, None]


def check_kept(model: nn.Module, heads: Heads) -> list[tuple[AttentionLayer, list[int]]]:
    """Check ``heads`` and return the layers named, each with its sorted heads, in the model's order."""
    every = attention_layers(model)
    if not isinstance(heads, Mapping) or not heads:
        raise usage_error("heads", "a dictionary {layer: [heads]}", describe(heads), "name a layer")
    kept: dict[int, list[int]] = {}
    for index, which in heads.items():
        layer = every[layer_index(index, len(every))]
        if layer.index in kept:
            raise usage_error(
                "heads", "each layer once", describe(list(heads)), "remove the repetition"
            )
        kept[layer.index] = _check_heads(layer, which)
    return [(every[index], kept[index]) for index in sorted(kept)]


def _check_heads(layer: AttentionLayer, which: Any) -> list[int]:
    given = as_list(which, layer.num_heads)
    numbers = [whole_number(head) for head in given or ()]
    found = sorted(n for n in numbers if n is not None and 0 <= n < layer.num_heads)
    if not found or len(set(found)) < len(numbers):
        wanted = (
            f"a list of different heads from 0 to {layer.num_heads - 1} for layer {layer.index}"
        )
        masked = any(map(is_boolean, given or [which]))
        hint = (
            "for a mask pass the numbers of the heads that stay" if masked else "keep at least one"
        )
        raise usage_error("heads", wanted, describe(which if given is None else given), hint)
    return found


def head_scale(layer: AttentionLayer, kept: Sequence[int], rescale: bool) -> Tensor:
    """The factors ``[H]`` of the heads: 0 for those that go, 1 or H / kept for those that stay."""
    scale = torch.zeros(layer.num_heads, dtype=torch.float64)
    scale[list(kept)] = layer.num_heads / len(kept) if rescale else 1.0
    return scale


def prune_heads(model: nn.Module, heads: Heads, rescale: bool = True) -> nn.Module:
    """Remove the heads not listed from the weights; the outputs are those of ``keep_heads``.

    The layer's projections lose the rows and its output projection the columns of the heads that go; H /
    kept is folded into the latter. The model is changed in place, entirely or, whatever fails or
    interrupts, not at all; each pruned layer's ``kept_heads`` says which of its ``original_heads`` are
    left. ``save_pruned`` and ``load_pruned`` keep it in a file.

    The pruned layers' parameters are new ones, without ``grad``, no longer tied to others. An optimizer
    made before still holds the old ones: it would go on without an error and train nothing of these
    layers. Make a new one before training on, as after ``load_pruned``; a warning says so where an
    optimizer that holds them is found.

    Args:
        model, heads, rescale: as in ``keep_heads``.

    Returns:
        ``model``.

    Raises:
        UsageError: a layer or head that does not exist, or an empty selection.
        UnsupportedError: the module's own forward does not allow fewer heads, or something in it mixes
            heads (timm's ``scale_norm``, ``gated``): ``keep_heads`` masks them. Weights that are
            sharded or parametrised; a linear layer of two attention modules; a model inside DDP, or inside
            an open context of this library.
    """
    kept = check_kept(model, heads)
    chosen = [layer for layer, _ in kept]
    refuse(chosen, "prune")
    _refuse_in_use(model, chosen)
    _refuse_shared(model, chosen)
    changes = [change for layer, which in kept for change in _changes(layer, which, rescale)]
    warn_of_optimizers(replaced_parameters(changes))
    swap(changes)
    return model


def _refuse_in_use(model: nn.Module, chosen: Sequence[AttentionLayer]) -> None:
    """Refuse a model in use by DDP or an open context, which would keep its old parameters or head counts."""
    if is_ddp(model):
        raise UnsupportedError(
            "prune: DDP averages the gradients of the parameters it was built with; prune the model "
            "first, then wrap it"
        )
    for context in open_attachments():
        layers = getattr(context, "layers", ())  # those of second_order are nobody's
        if {layer.module for layer in chosen} & {layer.module for layer in layers}:
            name = type(context).__name__
            raise UnsupportedError(
                f"prune: inside `with {name}` of this model; leave the block first"
            )


def _refuse_shared(model: nn.Module, chosen: Sequence[AttentionLayer]) -> None:
    """Refuse a layer that shares a linear layer with another attention module, which needs it whole."""
    uses = Counter(linear for layer in attention_layers(model) for linear in layer.linear)
    for layer in chosen:
        if any(uses[linear] > 1 for linear in layer.linear):
            raise UnsupportedError(
                f"prune: {layer.name} shares a linear layer with another attention module, which needs it "
                "whole; use dvf.keep_heads"
            )


@torch.no_grad()
def _changes(layer: AttentionLayer, kept: list[int], rescale: bool) -> Iterator[Change]:
    """Yield the changes that prune ``layer``, without making them."""
    module, heads = layer.module, layer.num_heads
    factor = heads / len(kept) if rescale else 1.0
    original = getattr(module, "kept_heads", tuple(range(heads)))
    for projection in layer.projections:
        yield from _shrink_projection(projection, heads, kept)
    output: Any = layer.output
    weight = _like(output.weight, _channels(output.weight, heads, kept, 1) * factor)
    width = weight.shape[1]
    yield output, "weight", weight
    yield output, "in_features", width
    counts = {name: len(kept) for name in (*HEAD_COUNTS, "num_kv_heads")}
    widths = dict.fromkeys(("attn_dim", "kv_dim"), width)  # timm's
    for name, value in (counts | widths).items():
        if hasattr(module, name):
            yield module, name, value
    yield module, "original_heads", getattr(module, "original_heads", heads)
    yield module, "kept_heads", tuple(original[h] for h in kept)


def _shrink_projection(projection: Projection, heads: int, kept: list[int]) -> Iterator[Change]:
    linear: Any = projection.owner
    groups = len(projection.roles) * heads
    rows = [role * heads + h for role in range(len(projection.roles)) for h in kept]
    weight = _like(linear.weight, _channels(linear.weight, groups, rows, 0))
    yield linear, "weight", weight
    if linear.bias is not None:
        yield linear, "bias", _like(linear.bias, _channels(linear.bias, groups, rows, 0))
    yield linear, "out_features", len(weight)


def _channels(x: Tensor, groups: int, kept: list[int], dim: int) -> Tensor:
    """Split axis ``dim`` of ``x`` into ``groups`` equal parts and keep those listed."""
    chosen = torch.tensor(kept, device=x.device)
    return x.unflatten(dim, (groups, -1)).index_select(dim, chosen).flatten(dim, dim + 1)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.clone(), requires_grad=old.requires_grad)
