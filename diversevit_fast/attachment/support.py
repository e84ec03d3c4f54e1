"""Tell which uses each attention layer of a model allows, as far as it is known before a forward."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from .._torch_internals import own_parameters
from ..errors import UnsupportedError
from .attention_modules import AttentionLayer, attention_layers, plain_class, qualified_class_name

USES = ("wrt='input'", "wrt='output'", "mask", "prune")
"""Uses of an attention layer: both definitions of the penalty, ``keep_heads``, ``prune_heads``."""
HOW_TO_FUSE = (
    "for transformers set attn_implementation='sdpa', inside a compiled loss timm's fused_attn=True, "
    "or choose other layers"
)


@dataclass(frozen=True)
class LayerSupport:
    """One attention layer, with the reason for each of ``USES`` that it does not allow."""

    index: int
    name: str
    kind: str
    num_heads: int
    refusals: dict[str, str]

    def allows(self, use: str) -> bool:
        """True if the layer allows ``use``, one of ``USES``."""
        return use not in self.refusals

    def __str__(self) -> str:
        words = [f"{use}: {self.refusals.get(use, 'yes')}" for use in USES]
        return f"{self.index} {self.name} ({self.kind}, {self.num_heads} heads): {'; '.join(words)}"


def supported(model: nn.Module) -> list[LayerSupport]:
    """List what each attention layer of ``model`` allows, in order of definition.

    >>> for layer in supported(model):
    ...     print(layer)

    Reasons that only a forward shows (attention called twice, queries made of another tensor) are not
    listed; the forward then raises a one-line error.

    Raises:
        UsageError: no attention layer was found.
    """
    return [
        LayerSupport(
            layer.index,
            layer.name,
            plain_class(layer.module).__name__,
            layer.num_heads,
            refusals(layer),
        )
        for layer in attention_layers(model)
    ]


def refuse(layers: Sequence[AttentionLayer], use: str) -> None:
    """Raise an UnsupportedError, with the reason, if one of ``layers`` does not allow ``use``."""
    for layer in layers:
        reason = refusals(layer).get(use)
        if reason is not None:
            raise UnsupportedError(
                f"{use}: {layer.name} ({plain_class(layer.module).__name__}): {reason}"
            )


def refusals(layer: AttentionLayer) -> dict[str, str]:
    """The reason for each of ``USES`` that ``layer`` does not allow."""
    unseen = _why_unseen(layer)
    if unseen:
        return dict.fromkeys(USES, unseen)
    found = {"wrt='input'": _why_no_input(layer), "prune": _why_not_pruned(layer)}
    if qualified_class_name(layer.module) in _OVER_CHANNELS:
        found["wrt='output'"] = "its heads attend over channels, not tokens; use wrt='input'"
    return {use: reason for use, reason in found.items() if reason}


def _why_unseen(layer: AttentionLayer) -> str | None:
    """The reason if the layer computes attention without a call that can be observed, else None."""
    module = layer.module
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "sdpa")
    if implementation not in ("sdpa", "diversevit"):
        hint = "model.set_attn_implementation('sdpa') first"
        return f"its attention is {implementation!r}, whose heads cannot be seen; {hint}"
    if qualified_class_name(module).startswith("timm.") and not _calls_attention(
        plain_class(module)
    ):
        return "it computes attention itself, not by F.scaled_dot_product_attention; choose other layers"
    return None


@cache
def _calls_attention(cls: type) -> bool:
    return "scaled_dot_product" in inspect.getsource(cls)


def _why_no_input(layer: AttentionLayer) -> str | None:
    if len({len(p.weight) // len(p.roles) for p in layer.projections}) > 1:
        return (
            "heads share keys and values, so their gradients cannot be told apart; use wrt='output'"
        )
    if isinstance(getattr(layer.module, "sr", None), nn.Module):
        return "its keys and values are made of pooled tokens; use wrt='output'"
    return None


def _why_not_pruned(layer: AttentionLayer) -> str | None:
    module: Any = layer.module
    hint = "use dvf.keep_heads"
    if _class_name(module) not in PRUNABLE:
        return f"its own forward does not allow fewer heads; {hint}"
    gate, norm = getattr(module, "gate", None), getattr(module, "norm", None)
    if gate is not None or not (norm is None or isinstance(norm, nn.Identity)):
        return f"it has a norm or gate across heads after attention; {hint}"
    if _why_no_input(layer):
        return f"heads share keys and values; {hint}"
    if not all(type(own_parameters(owner).get("weight")) is nn.Parameter for owner in layer.linear):
        return f"a weight of it is sharded, quantised, parametrised or none of its own; {hint}"
    return None


def _class_name(module: nn.Module) -> str:
    name = qualified_class_name(module)
    return f"transformers.{name.rpartition('.')[2]}" if name.startswith("transformers.") else name


_OVER_CHANNELS = {"timm.models.xcit.XCA"}
PRUNABLE = {
    "diversevit_fast.nn.MultiHeadAttention",
    "diversevit_fast.integrations.timm.Attention",
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    *(
        f"transformers.{name}Attention"
        for name in (
            *("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "ViTMAE", "ViTMSN"),
            *("IJepa", "CLIP", "Siglip", "Siglip2"),
        )
    ),
}
"""Classes whose forward takes H from their own attributes and the rest from the projections."""
