"""What one sample of a model looks like: shape and dtype, as the model itself says."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import usage_error

_LARGEST = 1 << 20


def sample_of(model: nn.Module, inputs: object = None) -> Tensor:
    """A sample without memory of what ``model`` takes, without the batch's axis.

    Args:
        inputs: its shape, such as ``(3, 224, 224)``; or a batch ``[B, ...]``, of which shape and dtype are taken; None:
            images of the size that the model names.

    Raises:
        UsageError: the model names none, or ``inputs`` is neither.
    """
    if isinstance(inputs, Tensor):
        if inputs.ndim < 2:
            hint = "pass a batch as the model takes it"
            raise usage_error("inputs", "a batch [B, ...]", list(inputs.shape), hint)
        return torch.empty(inputs.shape[1:], dtype=inputs.dtype, device="meta")
    shape: Any = _images_of(model) if inputs is None else inputs
    if shape is None:
        raise usage_error(
            "inputs",
            "the shape of a sample, since the model does not say what it takes",
            "none",
            "say inputs=(3, 224, 224), or pass a batch",
        )
    good = isinstance(shape, Sequence) and not isinstance(shape, str) and len(shape) > 0
    if not good or not all(_is_size(n) for n in shape):
        wanted = "a batch, or the shape of a sample"
        raise usage_error("inputs", wanted, repr(inputs), "say (3, 224, 224)")
    return torch.empty(tuple(shape), device="meta")


def _is_size(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 < n <= _LARGEST


def _images_of(model: Any) -> tuple[int, ...] | None:
    """Shape of an image, from where timm, this library, torchvision and transformers keep it."""
    embed: Any = getattr(model, "patch_embed", None)
    if (size := getattr(embed, "img_size", None)) is not None:
        # of the first convolution: in a hybrid there is one before the embedding's own
        convolutions = (m.in_channels for m in embed.modules() if isinstance(m, nn.Conv2d))
        channels = next(convolutions, 3)
        return (channels, *_pair(size))
    config = getattr(model, "config", None)
    if isinstance(config, dict):  # DiverseViT, TimmClassifier
        return config.get("channels", 3), *_pair(config["image_size"])
    if (size := getattr(config, "image_size", None)) is not None:
        return getattr(config, "num_channels", 3), *_pair(size)
    if (size := getattr(model, "image_size", None)) is not None:
        return 3, *_pair(size)
    described = getattr(model, "default_cfg", None)
    return tuple(described["input_size"]) if isinstance(described, dict) else None


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
