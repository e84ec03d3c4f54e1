"""Build a model for a file's configuration, and check that the file's tensors fit it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..heads.pruning import prune_heads
from ..weight_files import StrPath, listing, path_error

if TYPE_CHECKING:
    from .diverse_vit import DiverseViT


def skeleton(
    build: "type[DiverseViT]",
    config: Mapping[str, Any],
    kept: Mapping[int, Sequence[int]] | None = None,
) -> "DiverseViT":
    """Build a model without storage, pruned to the ``kept`` heads of each layer.

    On the meta device initialisation costs nothing and leaves the random generators alone.

    Raises:
        UsageError: no model has these sizes or heads.
    """
    with torch.device("meta"):
        model = build(**config)
    if kept:
        prune_heads(model, {layer: list(heads) for layer, heads in kept.items()}, rescale=False)
    return model


def check_tensors(path: StrPath, got: Mapping[str, Any], wanted: Mapping[str, torch.Size]) -> None:
    """Check that ``got`` has exactly the keys and shapes ``wanted``, and one floating dtype.

    Raises:
        UsageError: naming the keys that do not fit.
    """
    if missing := [key for key in wanted if key not in got]:
        raise path_error(path, f"the keys {listing(missing)}", "a file without", "is it complete?")
    if extra := [key for key in got if key not in wanted]:
        raise path_error(path, "no other keys", listing(extra), "is it another model's?")
    first = next(iter(wanted))
    for key, shape in wanted.items():
        value = got[key]
        if not isinstance(value, Tensor):
            raise path_error(
                path, f"a tensor under {key}", type(value).__name__, "save tensors only"
            )
        if value.shape != shape:
            hint = "is it of another configuration?"
            raise path_error(path, f"{key} of shape {list(shape)}", list(value.shape), hint)
        if not value.is_floating_point():
            raise path_error(path, f"{key} of a floating dtype", value.dtype, "dequantise it")
        if value.dtype != got[first].dtype:
            wish = f"{key} of dtype {got[first].dtype} like {first}"
            raise path_error(path, wish, value.dtype, "save the weights in one dtype")
