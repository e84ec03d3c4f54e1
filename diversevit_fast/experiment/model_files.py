"""Read the model in a file of weights: of a run, of ``dvf.save_pruned``, or the authors' ``.pth``.

A file of ``DiverseViT.save`` (those of a run, and of ``select-heads --save``) holds its sizes, and so does that of a
timm model. One of
``dvf.save_pruned`` does not: its model is that of the run's ``config.json``. A published one is read as
``DiverseViT.from_published_checkpoint`` does.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.dominoes import IMAGE_SIZE
from ..errors import usage_error
from ..heads.pruned_files import load_pruned
from ..models import DiverseViT, TimmClassifier
from ..models.timm_classifier import config_in
from ..weight_files import path_error, read_tensors
from .config import MODEL_KEYS, is_path, read_config, resolve

AnyModel = DiverseViT | TimmClassifier
"""What weight files hold; ``config``, ``blocks``, ``kept_heads``, ``head_logits``, ``save`` mean the same in both."""
TORCH_FILES = (".pth", ".pt")
_SIZES = (*MODEL_KEYS, "channels", "image_size")
_HINT = "pass a file that a run, select-heads --save or dvf.save_pruned wrote"


@dataclass(frozen=True)
class Sizes:
    """What a file of weights may leave open.

    Attributes:
        heads: of every layer, of a published file.
        image: height and width in pixels, of a published file and one of ``dvf.save_pruned``; None: those of
            the settings, or of the data that come with the library.
    """

    heads: int = 4
    image: tuple[int, int] | None = None


def load_model(path: str, config: str | None = None, sizes: Sizes | None = None) -> AnyModel:
    """Load the model in a file of weights, in evaluation mode on the CPU.

    Args:
        path: ``.pth`` and ``.pt`` are read as published weights, any other as safetensors.
        config: the run's ``config.json``, for a file that does not hold its sizes; None: the one beside it.
        sizes: given to a file that leaves them open; its defaults if None.

    Raises:
        UsageError: no such file, another one, ``sizes`` for a file that holds its own, or weights that
            are not float32 or not finite.
    """
    if not is_path(path):
        raise usage_error("weights", "a file of weights", repr(path), "name it")
    model = _read(path, config, sizes).eval()
    for name, tensor in model.state_dict().items():
        if tensor.dtype != torch.float32:
            hint = "save them in that dtype"
            raise usage_error("weights", "tensors of dtype torch.float32", f"{tensor.dtype}", hint)
        if not tensor.isfinite().all():
            hint = "take those of another training"
            raise usage_error("weights", "finite numbers", f"NaN or infinity in {name}", hint)
    return model


def load_start(model: DiverseViT, path: str) -> bool:
    """Load the weights in a file, where a training is to begin, into a new model.

    Args:
        model: on the CPU; its classifier stays as it is if the file's has another number of classes.
        path: as for ``load_model``; a published file has the model's heads and image size.

    Returns:
        Whether the classifier is the file's.

    Raises:
        UsageError: as ``load_model``; the weights of another architecture, of other sizes, or with pruned heads.
    """
    config = model.config
    published = Path(path).suffix.lower() in TORCH_FILES
    sizes = Sizes(config["num_heads"], config["image_size"]) if published else None
    found = load_model(path, sizes=sizes)
    if not isinstance(found, DiverseViT):
        name = found.config["name"]
        raise path_error(path, "weights of DiverseViT", f"timm {name}", f"say --model timm:{name}")
    if others := [k for k in _SIZES if found.config[k] != config[k]]:
        wanted = f"weights of a model with {_listed(config, others)}, as this run's"
        hint = "say so with --preset paper, or as model in a --config"
        raise path_error(path, wanted, _listed(found.config, others), hint)
    if any(len(kept) < config["num_heads"] for kept in found.kept_heads.values()):
        hint = "take the weights it was pruned from"
        raise path_error(path, "weights of all heads", "a pruned model", hint)
    state = found.state_dict()
    same = found.config["num_classes"] == config["num_classes"]
    if not same:
        state = {name: x for name, x in state.items() if not name.startswith("head.")}
    model.load_state_dict(state, strict=same)
    return same


def _listed(config: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {reprlib.repr(config[name])}" for name in names)


def config_beside(path: str, config: str | None) -> str | None:
    """Return ``config``, or the ``config.json`` in the folder of the weights; None if there is none.

    Raises:
        UsageError: no name of a file.
    """
    if config is not None and not is_path(config):
        raise usage_error("config", "a JSON file", repr(config), "name one, or leave it out")
    beside = Path(path).parent / "config.json"
    return str(beside) if config is None and beside.exists() else config


def sizes_of(heads: int | None, image: str | None) -> Sizes | None:
    """Return the sizes that options give; None if they give none.

    Raises:
        UsageError: ``image`` is not two positive whole numbers.
    """
    if heads is None and image is None:
        return None
    numbers = None if image is None else _pair(image)
    return Sizes(Sizes.heads if heads is None else heads, numbers)


def _pair(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) == 2 and all(p.isascii() and p.isdigit() and 0 < int(p) < 2**20 for p in parts):
        return int(parts[0]), int(parts[1])
    wanted = "height and width in pixels, such as 64,32"
    raise usage_error("image_size", wanted, reprlib.repr(text), "mend it")


def _read(path: str, config: str | None, sizes: Sizes | None) -> AnyModel:
    open_sizes = sizes or Sizes()
    if Path(path).suffix.lower() in TORCH_FILES:
        return DiverseViT.from_published_checkpoint(
            path, num_heads=open_sizes.heads, image_size=open_sizes.image or IMAGE_SIZE
        )
    timm = config_in(path) is not None
    metadata, tensors = ({}, {}) if timm else read_tensors(path, _HINT)
    if "pruned_layers" in metadata:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return load_pruned(_unpruned(path, config, open_sizes.image, shapes), path)  # type: ignore
    if sizes is not None:
        wanted = "no sizes for a file that holds its own"
        raise usage_error("num_heads, image_size", wanted, path, "leave these options out")
    return TimmClassifier.load(path) if timm else DiverseViT.load(path)


def _unpruned(
    path: str, config: str | None, image: Sequence[int] | None, shapes: dict[str, tuple[int, ...]]
) -> DiverseViT:
    """Build the model that was pruned; shapes that the run's settings do not hold are the file's."""
    found = config_beside(path, config)
    if found is None:
        hint = "name its run's with --config, or save with select-heads --save"
        raise path_error(path, "a config.json beside it, which has the sizes", "none", hint)
    settings = resolve(read_config(found))
    if image is None:
        image = (settings.img_size, settings.img_size) if settings.img_size else IMAGE_SIZE
    sizes = settings.model
    patch = sizes.get("patch_size", 4)
    pixels, classes = (shapes.get(name, (0, 0)) for name in ("patch_embed.weight", "head.weight"))
    channels = pixels[-1] // patch**2 or 1
    return DiverseViT(
        image_size=tuple(image), channels=channels, num_classes=classes[0] or 1, **sizes
    )
