"""A vision transformer of timm that classifies the images of this library's data sets.

It takes images as the data sets give them: float, from 0 to 1, of any size. It resizes and normalises them itself, as
timm's configuration of the model says, so that training, evaluation and weight files need to know nothing of that.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attachment.attention_modules import attention_layers, blocks_from
from ..errors import UsageError, require, usage_error
from ..heads.prefix_cache import PrefixCache
from ..heads.pruned_files import load_pruned, save_pruned
from ..weight_files import StrPath, path_error, read_metadata
from . import timm_last_block

_CONFIG = "timm_classifier"
_HINT = "pass a file that diversevit run wrote"
_MODES = ("bilinear", "bicubic")
_LARGEST = 4096  # pixels


class TimmClassifier(nn.Module):
    """A timm model with a new head, and the preparation of its images.

    Args:
        name: of the model in timm, with or without the tag of pretrained weights; none are downloaded.
        image_size: height and width in pixels of the images that it is given.
        num_classes: logits per image.
        size: the longer side that images are resized to, a multiple of the patch size; the shorter side is the nearest
            multiple that keeps the shape. None: the size that timm's configuration names.
        pretraining: a label, kept with the weights.

    Attributes:
        model: timm's. Initial weights are timm's, from PyTorch's default generator.
        config: the arguments above, and the number of ``"channels"``.
        input_size: height and width that images are resized to.

    Raises:
        UsageError: timm does not know the name, the model is no vision transformer that takes other sizes, or
            timm is not installed.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        image_size: Sequence[int],
        num_classes: int,
        size: int | None = None,
        pretraining: str = "random",
    ):
        super().__init__()
        self._arguments: dict[str, Any] = {
            "name": name,
            "image_size": [int(side) for side in image_size],
            "num_classes": num_classes,
            "size": size,
            "pretraining": pretraining,
        }
        self.config = {**self._arguments, "channels": 3}
        patch, native, cfg = _facts(name)
        self.input_size = _input_size(image_size, native if size is None else size, patch)
        self._mode = cfg.get("interpolation") if cfg.get("interpolation") in _MODES else "bilinear"
        self.model = _create(name, num_classes=num_classes, img_size=self.input_size)
        attention_layers(self.model)  # refuses what has none
        for part in ("mean", "std"):
            values = torch.tensor(cfg[part]).view(3, 1, 1)
            self.register_buffer(part, values, persistent=False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules around the attention layers, one for each."""
        return blocks_from(self.model, attention_layers(self.model)[0])

    @property
    def kept_heads(self) -> dict[int, tuple[int, ...]]:
        """The heads that each layer still has, by their indices before pruning."""
        return {
            layer.index: tuple(getattr(layer.module, "kept_heads", range(layer.num_heads)))
            for layer in attention_layers(self.model)
        }

    def prepare(self, images: Tensor) -> Tensor:
        """Resize (without aliasing) and normalise: ``[B, 3, height, width]`` from 0 to 1 -> the timm model's input.

        Raises:
            UsageError: images of another shape than ``config`` says.
        """
        wanted = (3, *self.config["image_size"])
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            said = f"shape [B, {', '.join(map(str, wanted))}]"
            raise usage_error("images", said, list(images.shape), "give the model's own data")
        if tuple(images.shape[2:]) != self.input_size:
            options: Any = {"mode": self._mode, "antialias": True, "align_corners": False}
            images = F.interpolate(images, self.input_size, **options).clamp(0, 1)
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, height, width] -> [B, num_classes]``.

        Raises:
            UsageError: as ``prepare``.
        """
        return self.model(self.prepare(images))

    def head_logits(self, images: Tensor) -> Tensor:
        """Compute the logits of all heads, then of each head of the last layer alone (see ``DiverseViT``).

        Returns:
            ``[1 + H, B, num_classes]``, without a graph.
        """
        x = self.prepare(images)
        if timm_last_block.why_not(self.model) is None:
            return timm_last_block.head_logits(self.model, timm_last_block.tokens(self.model, x))
        layer = attention_layers(self.model)[-1]
        choices: list[Any] = [{}, *({layer.index: [head]} for head in range(layer.num_heads))]
        cache = PrefixCache(self.model, [layer])
        with cache:
            return torch.stack(list(cache.outputs(choices, x)))

    def save(self, path: StrPath) -> None:
        """Write weights, configuration and kept heads as one safetensors file.

        It is a file of ``dvf.save_pruned``: ``dvf.load_pruned`` reads it into timm's model.

        Raises:
            UsageError: the folder does not exist, or safetensors is not installed.
        """
        save_pruned(self.model, path, metadata={_CONFIG: json.dumps(self._arguments)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "TimmClassifier":
        """Load the model that ``save`` wrote to ``path``, pruned as it was, on the CPU.

        Raises:
            UsageError: no such file, not one that ``save`` wrote, or timm is not installed.
        """
        found = config_in(path)
        if found is None:
            raise path_error(path, "a timm model's file", "another", _HINT)
        with torch.random.fork_rng(devices=[]):
            try:
                model = cls(**found)
            except (TypeError, ValueError, OverflowError) as failure:
                if isinstance(failure, UsageError):
                    raise path_error(path, "a valid configuration", f"({failure})", _HINT) from None
                got = f"one that does not fit ({type(failure).__name__})"
                raise path_error(path, "a configuration of a timm model", got, _HINT) from None
        load_pruned(model.model, path)
        return model


def config_in(path: StrPath) -> Mapping[str, Any] | None:
    """Return the configuration in a weight file; None if it is no timm model's."""
    text = read_metadata(path).get(_CONFIG)
    if text is None:
        return None
    try:
        config = json.loads(text)
    except (RecursionError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise path_error(path, "a configuration of a timm model", "no JSON object", _HINT)
    return config


def _facts(name: str) -> tuple[int, int, dict[str, Any]]:
    """Return patch size, native size (the longer side) and timm's configuration of a model; builds none."""
    with torch.device("meta"):
        model = _create(name, num_classes=0)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides: Any = patch if isinstance(patch, Sequence) else [patch]
    if not all(type(side) is int and side > 0 for side in sides) or len(set(sides)) != 1:
        hint = "choose one with square patches, such as timm:vit_small_patch16_224"
        raise usage_error("model", "a vision transformer of timm", repr(name), hint)
    return sides[0], max(model.pretrained_cfg["input_size"][1:]), model.pretrained_cfg


def _create(name: str, **options: Any) -> Any:
    """Create timm's model; its errors become one line."""
    timm = require("timm", extra="train")
    if not isinstance(name, str) or not timm.is_model(name):
        hint = "timm.list_models('vit*') lists names"
        raise usage_error("model", "timm: and a model that timm knows", repr(name), hint)
    try:
        return timm.create_model(name, pretrained=False, **options)
    except MemoryError:
        raise
    except Exception as failure:  # of any kind: timm's models check sizes each in their way
        said = str(failure).partition("\n")[0][:200]
        wanted = f"a model that takes {', '.join(f'{k}={v}' for k, v in options.items())}"
        got = f"{name} ({type(failure).__name__}: {said})"
        raise usage_error("model", wanted, got, "choose another model or size") from None


def _input_size(image_size: Sequence[int], longest: int, patch: int) -> tuple[int, int]:
    """Return ``image_size`` scaled to the longer side ``longest``, in whole patches."""
    if type(longest) is not int or not 0 < longest <= _LARGEST or longest % patch:
        near = (
            min(max(patch, longest // patch * patch), _LARGEST) if type(longest) is int else patch
        )
        wanted = f"a multiple of the patch size {patch}, at most {_LARGEST}"
        raise usage_error("img_size", wanted, longest, f"try {near}")
    most = max(image_size)
    height, width = (max(1, round(side * longest / most / patch)) * patch for side in image_size)
    return height, width
