"""Taking heads away: by multiplying their outputs with zero, or for good.

The heads that stay are multiplied by H / kept, as published, so that the layer's output keeps its
scale; ``rescale=False`` leaves them alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attach import Attachment, AttentionLayer, Forward, attention_layers, layer_index
from .errors import UnsupportedError, expected

Kept = Mapping[int, Sequence[int]]


class keep_heads(Attachment):  # noqa: N801 (a verb, like torch.no_grad)
    """Context manager: in the layers named, heads not listed are multiplied by zero.

    >>> with keep_heads(model, {-1: [2]}):        # only head 2 of the last layer
    ...     logits = model(images)

    Args:
        model: a model with timm ``Attention`` or ``dvf.nn.MultiHeadAttention`` layers.
        heads: for each layer index (negative allowed), the heads that stay; other layers keep all.
        rescale: multiply the heads that stay by H / kept.

    Raises:
        UsageError: a layer or head that does not exist, or an empty selection.
    """

    def __init__(self, model: nn.Module, heads: Kept, rescale: bool = True):
        kept = check_kept(model, heads)
        super().__init__(model, [layer for layer, _ in kept])
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

    The layer's qkv projection loses the rows and its output projection the columns of the heads that
    go; H / kept is folded into the latter. The model is changed in place, entirely or, if an
    argument is wrong, not at all; each pruned layer's ``kept_heads`` says which original heads are
    left. To load a pruned ``state_dict``, prune a fresh model alike, then load.

    Args:
        model, heads, rescale: as in ``keep_heads``.

    Returns:
        ``model``.

    Raises:
        UsageError: a layer or head that does not exist, or an empty selection.
        UnsupportedError: something in the layer mixes heads (timm's ``scale_norm``, ``gated``).
    """
    kept = check_kept(model, heads)
    for layer, _ in kept:
        norm, gate = getattr(layer.module, "norm", None), getattr(layer.module, "gate", None)
        if gate is not None or not (norm is None or isinstance(norm, nn.Identity)):
            raise UnsupportedError(
                f"model: {layer.name} has a norm or gate across heads after attention, so its heads "
                "cannot be removed; use dvf.keep_heads"
            )
    for layer, which in kept:
        _remove(layer, which, rescale)
    return model


@torch.no_grad()
def _remove(layer: AttentionLayer, kept: list[int], rescale: bool) -> None:
    attn, heads = layer.module, layer.num_heads
    factor = heads / len(kept) if rescale else 1.0
    rows = _channels(attn.qkv.weight.unflatten(0, (3, heads, -1)), kept, 1).flatten(0, 2)
    bias = attn.qkv.bias
    if bias is not None:
        bias = _channels(bias.unflatten(0, (3, heads, -1)), kept, 1).flatten()
    columns = _channels(attn.proj.weight.unflatten(1, (heads, -1)), kept, 1).flatten(1) * factor
    original = getattr(attn, "kept_heads", tuple(range(heads)))

    attn.qkv = _linear_like(attn.qkv, rows, bias)
    attn.proj = _linear_like(attn.proj, columns, attn.proj.bias)
    attn.num_heads = len(kept)
    attn.kept_heads = tuple(original[h] for h in kept)
    if hasattr(attn, "attn_dim"):
        attn.attn_dim = columns.shape[1]


def _channels(weight: Tensor, kept: list[int], dim: int) -> Tensor:
    return weight.index_select(dim, torch.tensor(kept, device=weight.device))


def _linear_like(old: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear with these weights and ``old``'s dtype, device, mode and requires_grad."""
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.clone(), requires_grad=old.weight.requires_grad)
    if bias is not None and old.bias is not None:
        new.bias = nn.Parameter(bias.clone(), requires_grad=old.bias.requires_grad)
    return new.train(old.training)
