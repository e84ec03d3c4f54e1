"""Predict the class of images in files: ``diversevit predict``."""

import csv
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import require, usage_error
from ..files import FileError, read_bytes, reading
from ..heads.pruning import keep_heads
from .config import is_path, read_json
from .metrics import SELECTED, of_run, read_csv
from .models import AnyModel
from .run_files import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_BATCH = 64
_LARGEST = 2**30  # bytes of a file
_BROKEN = (OSError, SyntaxError, ValueError, EOFError)  # what Pillow raises for broken files

Prediction = dict[str, Any]


def find_images(names: Sequence[str]) -> list[Path]:
    """Return the files, and of folders the images in them and below, by name.

    Raises:
        UsageError: a name that nothing has, or a folder without images.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if not is_path(name) or not path.exists():
            raise usage_error("images", "files or folders", f"no {name!r}", "check the path")
        if not path.is_dir():
            found.append(path)
            continue
        with reading(path):
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not inside:
            wanted = f"images ({', '.join(s[1:] for s in SUFFIXES)}) in the folder {name}"
            raise usage_error("images", wanted, "none", "name the files")
        found += inside
    return found


def heads_of(text: str | None, model: AnyModel, weights: str) -> list[int]:
    """Return the heads of the last layer that ``--heads`` asks for, by their numbers before pruning.

    Args:
        text: numbers such as ``0,2``; ``selected``, the head that the weights' run selected; or None for all.

    Raises:
        UsageError: neither, or heads that the last layer does not have.
    """
    there = list(model.kept_heads[len(model.blocks) - 1])
    if text is None:
        return there
    if text == "selected":
        return [_selected_head(Path(weights))]
    parts = text.split(",")
    heads = [int(p) for p in parts if p.strip().isascii() and p.strip().isdigit()]
    if len(heads) < len(parts) or len(set(heads)) < len(heads) or not set(heads) <= set(there):
        wanted = f"selected, or different numbers among {', '.join(map(str, there))}"
        raise usage_error("heads", wanted, repr(text[:80]), "see diversevit select-heads")
    return sorted(heads)


def _selected_head(weights: Path) -> int:
    """Return the head that a run selected, for ``<method>-seed<number>.safetensors`` in its folder.

    Raises:
        UsageError: other weights.
    """
    method, _, seed = weights.stem.partition("-seed")
    run = []
    if seed.isascii() and seed.isdigit() and weights.suffix == ".safetensors":
        run = of_run(read_csv(weights.parent / "metrics.csv"), method, int(seed))
    if not run:
        wanted = "numbers for weights that are not those of a run's selected epoch"
        raise usage_error("heads", wanted, f"selected for {weights}", "name them: --heads 0")
    return int(SELECTED.pick(run)["heads"])


def class_names(config: str | None, model: AnyModel) -> list[str]:
    """Return the names of the classes that a run recorded, or numbers."""
    count = model.config["num_classes"]
    names = [] if config is None else read_json(Path(config), "config").get("classes", [])
    named = isinstance(names, list) and len(names) == len(set(map(str, names))) == count
    return list(map(str, names if named else range(count)))


def read_image(path: Path, model: AnyModel) -> tuple[Tensor, bool]:
    """Return an image as float32 ``[C, height, width]`` in [0, 1], and whether it was resized to the model's.

    As the images of a folder that a run trains on: made RGB (or grey), not turned as its EXIF data say, and
    resized bilinearly with antialiasing, without keeping the aspect ratio.

    Raises:
        UsageError: it cannot be read.
    """
    images = require("PIL.Image", extra="train")
    channels, (height, width) = model.config["channels"], model.config["image_size"]
    if channels not in (1, 3):
        raise usage_error("weights", "a model of 1 or 3 channels", channels, "use Python")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", images.DecompressionBombWarning)
            image = images.open(io.BytesIO(read_bytes(path, _LARGEST)))
            image.load()
    except FileError as refused:
        raise _unreadable(path, refused.reason) from None
    except images.UnidentifiedImageError:
        raise _unreadable(path, "no image that Pillow knows") from None
    except (*_BROKEN, images.DecompressionBombWarning, images.DecompressionBombError) as failure:
        raise _unreadable(path, failure) from None
    if image.mode.startswith(("I", "F")):
        raise _unreadable(path, "more than 8 bits a channel")
    image = image.convert("RGB" if channels == 3 else "L")
    resized = image.size != (width, height)
    if resized:
        image = image.resize((width, height), images.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(image)).reshape(height, width, channels)
    return values.permute(2, 0, 1).float() / 255, resized


def _unreadable(path: Path, failure: object) -> Exception:
    got = f"{path} ({' '.join(str(failure).split()) or 'cut off'})"
    return usage_error("images", "images that can be read", got, "restore it, or leave it out")


@torch.no_grad()
def predict(
    model: AnyModel, paths: Sequence[Path], heads: Sequence[int], names: Sequence[str]
) -> tuple[list[Prediction], int]:
    """Return a prediction for each image, and how many images were resized.

    Args:
        heads: of the last layer, by their numbers before pruning.
        names: of the classes.

    Returns:
        Dictionaries of ``image`` (its path), ``class`` (a name), ``label`` (its number), ``probability``,
        ``probabilities`` (of every class) and ``heads``.

    Raises:
        UsageError: a file cannot be read.
    """
    last = len(model.blocks) - 1
    there = list(model.kept_heads[last])
    found: list[Prediction] = []
    resized = 0
    for chunk in _chunks(paths):
        read = [read_image(path, model) for path in chunk]
        resized += sum(changed for _, changed in read)
        images = torch.stack([image for image, _ in read])
        if list(heads) == there:
            logits = model(images)
        else:
            with keep_heads(model, {last: [there.index(head) for head in heads]}):
                logits = model(images)
        for path, chances in zip(chunk, logits.softmax(-1).tolist(), strict=True):
            label = max(range(len(chances)), key=chances.__getitem__)
            found.append(
                {
                    "image": printable(os.fspath(path)),
                    "class": names[label],
                    "label": label,
                    "probability": chances[label],
                    "probabilities": dict(zip(names, chances, strict=True)),
                    "heads": list(heads),
                }
            )
    return found, resized


def _chunks(paths: Sequence[Path]) -> Iterator[list[Path]]:
    rest = iter(paths)
    while chunk := list(islice(rest, _BATCH)):
        yield chunk


def as_csv(found: Sequence[Prediction]) -> str:
    """Format predictions as CSV: image, class, label, probability, heads."""
    columns = ("image", "class", "label", "probability", "heads")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for one in found:
        heads = " ".join(map(str, one["heads"]))
        chance = f"{one['probability']:.9g}"
        writer.writerow([one["image"], one["class"], one["label"], chance, heads])
    return text.getvalue()


def as_json(found: Sequence[Prediction]) -> str:
    """Format predictions as a JSON list."""
    return json.dumps(list(found), indent=2) + "\n"


def as_table(found: Sequence[Prediction]) -> str:
    """Format predictions as aligned columns, and the heads in a last line."""
    width = max(len(one["class"]) for one in found)
    lines = [f"{one['class']:<{width}}  {one['probability']:.3f}  {one['image']}" for one in found]
    heads = ", ".join(map(str, found[0]["heads"]))
    return "\n".join([*lines, f"heads of the last layer: {heads}"]) + "\n"
