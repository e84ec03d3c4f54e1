"""Registers timm's ``VisionTransformer`` for the class-token shortcut; imported when one is first met."""

from typing import Any

from torch import Tensor

from ..attachment.class_token import register_class_token_model
from ..errors import require

_timm: Any = require("timm.models.vision_transformer", extra="train")


def _pools(model: Any) -> bool:
    return model.global_pool == "token" and model.attn_pool is None and not model.grad_checkpointing


def _block_forward(block: Any, x: Tensor) -> Tensor:
    """``timm``'s ``Block.forward``, for the class token from its attention on."""
    y = block.attn(block.norm1(x))[:, :1]
    x = x[:, :1] + block.drop_path1(block.ls1(y))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


register_class_token_model(_timm.VisionTransformer, _timm.Block, _block_forward, _pools)
