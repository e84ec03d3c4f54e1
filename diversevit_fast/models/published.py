"""Read and write the authors' checkpoint format, which has other names for the same tensors.

The published weights are a plain ``torch.save`` of a state dict. In both, patch pixels are ordered
row, column, channel and the rows of ``to_qkv`` (q, k, v), head, channel: only names change.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import usage_error
from ..files import read_bytes
from ..weight_files import StrPath, check_no_checkpoint, existing_file, listing, path_error
from .restore import check_tensors, skeleton

if TYPE_CHECKING:
    from .diverse_vit import DiverseViT

_NESTS = ("state_dict", "model")
_OUTER_NAMES = {
    "patch_embed.weight": "vit.to_patch_embedding.1.weight",
    "patch_embed.bias": "vit.to_patch_embedding.1.bias",
    "pos_embed": "vit.pos_embedding",
    "cls_token": "vit.cls_token",
    "norm.weight": "vit.mlp_head.0.weight",
    "norm.bias": "vit.mlp_head.0.bias",
    "head.weight": "vit.mlp_head.1.weight",
    "head.bias": "vit.mlp_head.1.bias",
}
_BLOCK_NAMES = {
    "norm1.weight": "0.norm.weight",
    "norm1.bias": "0.norm.bias",
    "attn.qkv.weight": "0.fn.to_qkv.weight",
    "attn.proj.weight": "0.fn.proj.0.weight",
    "attn.proj.bias": "0.fn.proj.0.bias",
    "norm2.weight": "1.norm.weight",
    "norm2.bias": "1.norm.bias",
    "mlp.0.weight": "1.fn.net.0.weight",
    "mlp.0.bias": "1.fn.net.0.bias",
    "mlp.2.weight": "1.fn.net.3.weight",
    "mlp.2.bias": "1.fn.net.3.bias",
}


def load(
    path: StrPath, build: "type[DiverseViT]", *, num_heads: int, image_size: Sequence[int]
) -> "DiverseViT":
    """Implement ``DiverseViT.from_published_checkpoint``."""
    state = _read(path)
    model = skeleton(build, _infer_config(path, state, num_heads, image_size))
    names = published_names(model.config["depth"])
    wanted = {names[ours]: tensor.shape for ours, tensor in model.state_dict().items()}
    check_tensors(path, state, wanted)
    tensors = {ours: state[theirs].detach().clone() for ours, theirs in names.items()}
    model.load_state_dict(tensors, assign=True)
    return model


def to_published_state_dict(model: "DiverseViT") -> dict[str, Tensor]:
    """The model's weights under the published names, sharing its memory like ``model.state_dict()``.

    Raises:
        UsageError: a model the published format cannot describe: pruned heads, or a residual around
            the last attention.
    """
    if model.config["last_residual"]:
        hint = "use model.save, which records it"
        raise usage_error("model", "last_residual=False, as published", "last_residual=True", hint)
    pruned = [i for i, kept in model.kept_heads.items() if len(kept) < model.config["num_heads"]]
    if pruned:
        hint = "use model.save, which records the kept heads"
        raise usage_error("model", "all its heads", f"pruned layers {pruned}", hint)
    state = model.state_dict()
    return {theirs: state[ours] for ours, theirs in published_names(len(model.blocks)).items()}


def published_names(depth: int) -> dict[str, str]:
    """Map our state dict's keys to the published ones, for a model of ``depth`` blocks."""
    blocks = {
        f"blocks.{i}.{ours}": f"vit.transformer.layers.{i}.{theirs}"
        for i in range(depth)
        for ours, theirs in _BLOCK_NAMES.items()
    }
    return _OUTER_NAMES | blocks


def _read(path: StrPath) -> Mapping[str, Any]:
    """Load the state dict of a file, where it may be bare or under one of ``_NESTS``."""
    data = read_bytes(existing_file(path))
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as failure:  # on a foreign file the unpickler can raise anything
        hint = "re-save the weights with torch.save(model.state_dict(), path)"
        got = f"one that weights-only loading refuses ({type(failure).__name__})"
        raise path_error(path, "an intact torch.save file of tensors", got, hint) from None
    check_no_checkpoint(path, content)
    if not isinstance(content, Mapping):
        raise path_error(path, "a state dict", type(content).__name__, "save model.state_dict()")
    if any(str(key).startswith("vit.") for key in content):
        return content
    nests = [key for key in _NESTS if isinstance(content.get(key), Mapping)]
    if len(nests) != 1:
        wanted = 'keys "vit.*", bare or under exactly one of "state_dict" and "model"'
        raise path_error(
            path, wanted, listing(list(content)) or "no keys", "save the state dict alone"
        )
    return content[nests[0]]


def _infer_config(
    path: StrPath, state: Mapping[str, Any], num_heads: int, image_size: Sequence[int]
) -> dict[str, Any]:
    """Infer the constructor's arguments from the shapes of the tensors."""
    first = "vit.transformer.layers.0."
    _, tokens, dim = _shape(path, state, "vit.pos_embedding", 3)
    _, pixels = _shape(path, state, "vit.to_patch_embedding.1.weight", 2)
    inner = _shape(path, state, first + "0.fn.proj.0.weight", 2)[1]
    mlp_dim = _shape(path, state, first + "1.fn.net.0.weight", 2)[0]
    num_classes = _shape(path, state, "vit.mlp_head.1.weight", 2)[0]
    patch = _patch_size(image_size, tokens - 1)
    if not isinstance(num_heads, int) or num_heads < 1 or inner % num_heads:
        wanted = f"a divisor of the checkpoint's attention width {inner}"
        raise usage_error(
            "num_heads", wanted, repr(num_heads), "pass the count it was trained with"
        )
    if pixels % patch**2:
        wanted = f"patches of {pixels} values, as the checkpoint embeds"
        raise usage_error("image_size", wanted, f"patches of {patch}x{patch} pixels", "check it")
    layers = (re.match(r"vit\.transformer\.layers\.(\d+)\.", str(key)) for key in state)
    return {
        "image_size": tuple(image_size),
        "patch_size": patch,
        "channels": pixels // patch**2,
        "num_classes": num_classes,
        "dim": dim,
        "depth": len({match[1] for match in layers if match}),
        "num_heads": num_heads,
        "head_dim": inner // num_heads,
        "mlp_dim": mlp_dim,
        "last_residual": False,
    }


def _shape(path: StrPath, state: Mapping[str, Any], key: str, ndim: int) -> tuple[int, ...]:
    if key not in state:
        raise path_error(path, f"the key {key}", "a checkpoint without", "is it complete?")
    value = state[key]
    if not isinstance(value, Tensor) or value.ndim != ndim or 0 in value.shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise path_error(path, f"{key}, a tensor of {ndim} axes", got, "is it another model's?")
    return tuple(value.shape)


def _patch_size(image_size: Sequence[int], patches: int) -> int:
    """The side of square patches such that ``patches`` of them tile the image."""
    wanted = f"(height, width) tiled by the checkpoint's {patches} square patches"
    try:
        height, width = image_size
        side = math.isqrt(height * width // max(patches, 1))
        fits = side > 0 and side**2 * patches == height * width
        if fits and height % side == width % side == 0:
            return side
    except (TypeError, ValueError):
        pass  # not a pair of integers: the same error as below
    raise usage_error("image_size", wanted, repr(image_size), "pass the size it was trained on")
