"""The few-query path: with class-token pooling, the last block is computed for one token.

Nothing downstream of the last block then reads another token, so its attention needs one query row:
forward, backward and double backward cost O(N d) there. Exact, and only taken where it is certain
that the other tokens are not read: during the forward of a model whose classes are known, pooled by
the class token, with no hook that could look at them.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .attention_modules import is_hooked, plain_class
from .unfused_attention import watched


def one_token_block(model: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The last block of ``model``, if ``attention`` is its attention and only its class token is read."""
    if not _pools_class_token(model):
        return None
    whole: Any = model
    block = list(whole.blocks.children())[-1]
    watches = (whole.blocks, *block.modules(), whole.norm)
    known = plain_class(block) in _forwards() and getattr(block, "attn", None) is attention
    return block if known and not is_hooked(watches) and not watched(attention) else None


def one_token_forward(block: nn.Module, x: Tensor) -> Tensor:
    """``block`` on ``[B, N, D]``, for the class token alone: ``[B, 1, D]``."""
    return _forwards()[plain_class(block)](block, x)


def _pools_class_token(model: nn.Module) -> bool:
    diverse_vit = sys.modules.get("diversevit_fast.models.diverse_vit")
    if diverse_vit is not None and plain_class(model) is diverse_vit.DiverseViT:
        return True
    timm = sys.modules.get("timm.models.vision_transformer")
    return (
        timm is not None
        and plain_class(model) is timm.VisionTransformer
        and model.global_pool == "token"
        and model.attn_pool is None
        and not model.grad_checkpointing
    )


def _forwards() -> dict[type, Callable[[Any, Tensor], Tensor]]:
    """Block classes, each with its forward restricted to the class token."""
    forwards: dict[type, Callable[[Any, Tensor], Tensor]] = {}
    if diverse_vit := sys.modules.get("diversevit_fast.models.diverse_vit"):
        forwards[diverse_vit.Block] = _diverse_vit_block
    if timm := sys.modules.get("timm.models.vision_transformer"):
        forwards[timm.Block] = _timm_block
    return forwards


def _diverse_vit_block(block: Any, x: Tensor) -> Tensor:
    return block.after_attention(x[:, :1], block.attn(block.norm1(x))[:, :1])


def _timm_block(block: Any, x: Tensor) -> Tensor:
    y = block.attn(block.norm1(x))[:, :1]
    x = x[:, :1] + block.drop_path1(block.ls1(y))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
