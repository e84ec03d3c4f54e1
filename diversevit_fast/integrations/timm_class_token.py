"""Registers timm's ``VisionTransformer`` for the class-token shortcut; imported when one is first met."""

from typing import Any

from torch import Tensor, nn

from .._torch_internals import (
    PLAIN_TENSORS,
    has_hooks,
    is_as_written,
    own_modules,
    own_parameters,
    runs_as_written,
)
from ..attachment.attention_modules import plain_class
from ..attachment.class_token import Attend, DirectForward, own_forwards, register_class_token_model
from ..errors import require
from ..ops import gelu, layer_norm
from ..ops.vit_end import Options, Weights
from .timm import Attention

_timm: Any = require("timm.models.vision_transformer", extra="train")
_layers: Any = require("timm.layers", extra="train")


def _pools(model: Any) -> bool:
    return model.global_pool == "token" and model.attn_pool is None and not model.grad_checkpointing


def _block_forward(block: Any, x: Tensor) -> Tensor:
    """``timm``'s ``Block.forward``, for the class token from its attention on."""
    y = block.attn(block.norm1(x))[:, :1]
    x = x[:, :1] + block.drop_path1(block.ls1(y))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _direct_forward(block: Any, x: Tensor, attend: Attend) -> Tensor:
    """The same by operators, in the blocks that ``_direct`` picks."""
    attn, mlp, norm = block.attn, block.mlp, block.norm2
    _, heads = attend(block.norm1(x))
    y = _through(attn.proj(heads.flatten(1)), attn.proj_drop, block.ls1, block.drop_path1)
    x = x[:, 0] + y
    y = layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    y = _through(gelu(mlp.fc1(y), approximate=mlp.act.approximate), mlp.drop1)
    y = _through(mlp.fc2(y), mlp.drop2, block.ls2, block.drop_path2)
    return (x + y).unsqueeze(1)


def _through(x: Tensor, *modules: nn.Module) -> Tensor:
    for module in modules:
        if not _does_nothing(module):
            x = module(x)
    return x


def _does_nothing(module: Any) -> bool:
    kind = type(module)
    return kind is nn.Identity or (kind is nn.Dropout and not (module.training and module.p))


_NORMS = (nn.LayerNorm, _layers.LayerNorm)
_FORWARDS = own_forwards(
    *(nn.Linear, nn.GELU, nn.Identity, nn.Dropout, *_NORMS),
    *(_layers.Attention, Attention, _layers.Mlp, _layers.DropPath, _timm.LayerScale),
)


def _direct(block: Any) -> DirectForward | None:
    """``_direct_forward`` where every module is timm's or PyTorch's own, and attention is followed by no more."""
    if not runs_as_written(block, _FORWARDS):
        return None
    attn, mlp, norm = block.attn, block.mlp, block.norm2
    nothing = (attn.q_norm, attn.k_norm, getattr(attn, "norm", None), getattr(mlp, "norm", None))
    simple = (
        all(x is None or type(x) is nn.Identity for x in nothing)
        and getattr(attn, "gate", None) is None
        and not (attn.training and attn.attn_drop.p)
        and type(mlp) is _layers.Mlp
        and type(mlp.act) is nn.GELU
        and type(norm) in _NORMS
        and not getattr(norm, "_fast_norm", False)  # of another precision under autocast
    )
    return _direct_forward if simple else None


def _end(model: Any, block: Any) -> tuple[Weights, Options] | None:
    """What ``vit_end`` takes in place of a ``_direct`` block and what follows, where all modules are the usual ones."""
    if not _methods_as_written(model):
        return None
    after: Any = own_modules(model)
    inside: Any = own_modules(block)
    attn: Any = own_modules(inside["attn"])
    mlp: Any = own_modules(inside["mlp"])
    last, head, norm, act = after["norm"], after["head"], inside["norm2"], mlp["act"]
    between = after["fc_norm"], after["head_drop"]
    for module in (*between, last, head):
        if not is_as_written(module, _FORWARDS) or has_hooks(module):
            return None
    if type(head) is not nn.Linear or type(last) not in _NORMS or getattr(last, "_fast_norm", 0):
        return None
    dropped = attn["proj_drop"], mlp["drop1"], mlp["drop2"], *map(inside.get, _OPTIONAL)
    if not all(map(_does_nothing, (*between, *dropped))):
        return None
    weights = []
    for module in (attn["proj"], norm, mlp["fc1"], mlp["fc2"], last, head):
        own = own_parameters(module)
        weights += own.get("weight"), own.get("bias")
    if not all(type(p) in PLAIN_TENSORS for p in weights):
        return None
    return Weights(*weights), Options(act.approximate, norm.eps, last.eps)


_OPTIONAL = ("ls1", "ls2", "drop_path1", "drop_path2")
_METHODS = ("forward", "forward_features", "forward_head", "pool")
"""Those that lead from the last block to the logits."""


def _methods(cls: type) -> list[Any]:
    return [getattr(cls, name) for name in _METHODS]


_WRITTEN = _methods(_timm.VisionTransformer)
_BY_TIMM = all(x.__module__ == _timm.__name__ for x in _WRITTEN)


def _methods_as_written(model: Any) -> bool:
    own = vars(model).keys().isdisjoint(_METHODS)
    return own and _BY_TIMM and _methods(plain_class(model)) == _WRITTEN


register_class_token_model(
    _timm.VisionTransformer, _timm.Block, _block_forward, _pools, _direct, _end
)
