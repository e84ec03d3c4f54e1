"""timm's ``VisionTransformer`` cut before its last block: what comes before, and a model of the rest.

The rest is a ``VisionTransformer`` too, of one block, whose input are the tokens that enter it: whatever knows timm's
models (the penalty, head selection, the class-token shortcut) knows it.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment.attention_modules import plain_class
from ..attachment.capture import capture_heads
from ..errors import require


def why_not(model: nn.Module) -> str | None:
    """Why a model is not one that this module can cut; None if it is."""
    library: Any = require("timm.models.vision_transformer", extra="train")
    vit: Any = model
    if plain_class(model) is not library.VisionTransformer:
        return f"{type(model).__name__} is another architecture"
    block = vit.blocks[-1]
    if plain_class(block) is not library.Block or getattr(block.attn, "gate", None) is not None:
        return f"its last block is a {type(block).__name__} of its own"
    if vit.global_pool != "token" or vit.attn_pool is not None:
        return f"it pools by {vit.global_pool or 'attention'}, not by the class token"
    return None


def tokens(vit: Any, x: Tensor) -> Tensor:
    """Compute the tokens ``[B, N, D]`` that enter the last block, from prepared images."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))
    return vit.blocks[:-1](x)


def head_logits(vit: Any, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Compute the logits of choices of the last layer's heads, from the tokens that enter it.

    Only the class token is computed, and what precedes the heads once for all choices.

    Args:
        vit: in evaluation mode, and one that ``why_not`` accepts.
        x: ``[B, N, D]``.
        keep: ``[C, H]``, what the heads' outputs are multiplied by in each choice. None: all heads, then each alone,
            which is the published test-time pruning: the others times zero, this one times H.

    Returns:
        ``[C, B, num_classes]``, without a graph; C is 1 + H if ``keep`` is None.
    """
    block = vit.blocks[-1]
    attn = block.attn
    with torch.no_grad():
        with capture_heads(block, layers="last") as captured:
            block.attn(block.norm1(x))
        heads = captured[-1][:, :, 0]  # [B, H, d] of the class token
        if keep is None:
            keep = heads.shape[1] * torch.eye(heads.shape[1])
            keep = torch.cat([torch.ones_like(keep[:1]), keep])
        keep = keep.to(heads)
        y = attn.norm((keep[:, None, :, None] * heads).flatten(-2))
        x = x[:, 0] + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(y))))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return vit.head(vit.head_drop(vit.fc_norm(vit.norm(x))))


def without_trunk(vit: Any) -> nn.Module:
    """Return a copy of all from the last block on, as a model that takes the tokens ``[B, N, D]``."""
    instead = {  # what a deep copy takes in place of the trunk
        vit.patch_embed: nn.Identity(),
        vit.norm_pre: nn.Identity(),
        vit.blocks: nn.Sequential(copy.deepcopy(vit.blocks[-1])),
        **dict.fromkeys((vit.cls_token, vit.reg_token, vit.pos_embed)),
    }
    last = copy.deepcopy(vit, {id(part): other for part, other in instead.items()})
    last._pos_embed = _unchanged
    return last


def whole_names(vit: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model ``without_trunk`` under the names that they have in ``vit``."""
    last = f"blocks.{len(vit.blocks) - 1}."
    return {name.replace("blocks.0.", last, 1): x for name, x in weights.items()}


def _unchanged(x: Tensor) -> Tensor:
    return x
