"""Everything before a model's last block, run once over all images: its tokens are kept in files.

The trunk does not change while ``freeze_below`` trains what follows it, so neither do its tokens. They lie in float16
under ``tokens`` in the cache folder (``DIVERSEVIT_CACHE_DIR``, else ``diversevit`` in ``XDG_CACHE_HOME`` or
``~/.cache``), a file for each split, named after all that they depend on: every run of the same model on the same data
reads the same files. Deleting them is safe.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import batches
from ..errors import usage_error
from ..files import path_exists, reading, write_atomically, writing
from ..heads.evaluation import evaluating
from ..installation import version_of
from ..models import timm_last_block
from ..ops.backends import cache_folder
from .config import Settings
from .models import TimmModel, backbone

_FORMAT = 1
_BATCH = 32


@dataclass(frozen=True)
class TokenSplit:
    """A split whose images are replaced by the tokens that enter the last block.

    Attributes:
        images: float16 ``[n, N, D]``, mapped from a file.
        labels, groups, group_names, num_classes, image_size: those of the split.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    group_names: tuple[str, ...]
    num_classes: int
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)


def inputs_of(
    settings: Settings,
    splits: Mapping[str, Any],
    prints: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    note: Callable[[str], object],
) -> Mapping[str, Any]:
    """Return what the training steps read: ``splits``, or their tokens where the trunk is frozen.

    Args:
        prints: the splits' fingerprints.
        note: told in a line when the trunk has to run.

    Raises:
        UsageError: the tokens cannot be written (a full disk, no cache folder) or are not finite in float16.
    """
    if settings.freeze_below is None:
        return splits
    folder = token_folder()
    paths = {
        name: folder / f"{_key(settings, split, prints[name])}-{name}.npy"
        for name, split in splits.items()
    }
    missing = [name for name, path in paths.items() if not path_exists(path)]
    if missing:
        count = sum(len(splits[name].labels) for name in missing)
        note(f"running the frozen trunk once over {count} images, into {folder}")
        model = TimmModel(settings, *_facts(splits[missing[0]])).whole().to(device)
        with evaluating(model):
            for name in missing:
                _write(paths[name], model, splits[name], device)
    return {name: _open(paths[name], split) for name, split in splits.items()}


def token_folder() -> Path:
    """Return the folder of tokens in the cache folder; create it if it is missing.

    Raises:
        UsageError: there is no place for it, or it cannot be created.
    """
    try:
        folder = cache_folder() / "tokens"
    except OSError as failure:
        hint = "set DIVERSEVIT_CACHE_DIR to a folder of your own"
        raise usage_error("cache folder", "one to keep tokens in", failure, hint) from None
    with writing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _key(settings: Settings, split: Any, split_print: Mapping[str, Any]) -> str:
    depends = {
        "format": _FORMAT,
        "architecture": settings.architecture,
        "img_size": settings.img_size,
        "weights": backbone(settings)["sha256"],
        "images": split_print["sha256"],
        "image_size": list(split.image_size),
        "timm": version_of("timm"),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]


def _facts(split: Any) -> tuple[Any, int]:
    return split.image_size, split.num_classes


@torch.no_grad()
def _write(path: Path, model: Any, split: Any, device: torch.device) -> None:
    """Compute and write the tokens of one split, whole or not at all."""

    def tokens(images: Tensor) -> Tensor:
        found = timm_last_block.tokens(model.model, model.prepare(images.to(device)))
        return found.half().cpu()

    shape = tokens(next(iter(batches(split, 1)))[0]).shape[1:]

    def write(file: Any) -> None:
        header = {"descr": "<f2", "fortran_order": False, "shape": (len(split), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for images, _, _ in batches(split, _BATCH):
            found = tokens(images)
            if not found.isfinite().all():
                got = f"others, from {model.config['name']}"
                raise usage_error("freeze_below", "tokens that float16 holds", got, "leave it out")
            file.write(found.numpy().astype("<f2", copy=False).tobytes())

    write_atomically(path, write)


def _open(path: Path, split: Any) -> TokenSplit:
    """Map the tokens of one split.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        with reading(path):
            found = np.load(path, mmap_mode="c")  # a private mapping: nothing is written back
    except (EOFError, ValueError):
        found = np.empty(0)
    if found.dtype != np.float16 or found.ndim != 3 or len(found) != len(split):
        raise usage_error(str(path), "the tokens of this split", "a damaged file", "delete it")
    images = torch.from_numpy(found)
    facts = split.labels, split.groups, split.group_names, split.num_classes, split.image_size
    return TokenSplit(images, *facts)
