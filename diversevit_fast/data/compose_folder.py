"""Write a data set like Waterbirds from a folder of cut-outs and a folder of photographs.

Waterbirds (Sagawa et al., arXiv 1911.08731, appendix C) lays birds cut out of CUB over scenes of Places.
"""

import csv
import io
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import require, usage_error
from ..files import list_names, path_exists, sync_folder, writing
from .compose import compose
from .dominoes import stream
from .group_folder import open_image

IMAGES = {"train": 1000, "val": 200, "test": 400}
SHARES = {"train": 1 / 2, "val": 1 / 6, "test": 1 / 3}
"""Of the sources; each split has some of its own."""
_SIZES = (0.5, 0.85)  # of the cut-out's longer side, relative to the image
_CROPS = (0.5, 1.0)  # of the background's square, relative to the photograph's shorter side
_CACHED = 32  # decoded photographs
_FEWEST = len(SHARES)


def compose_folder(
    foregrounds: str | os.PathLike[str],
    backgrounds: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    correlation: float = 0.95,
    images: Mapping[str, int] | None = None,
    img_size: int = 224,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a set of cut-outs over backgrounds in Waterbirds' layout: ``metadata.csv`` and PNG images.

    The k-th subfolder of ``foregrounds``, by name, is class k and belongs to the k-th of ``backgrounds``, place k. In
    the training set that place is behind ``correlation`` of the images of each class, and any other behind the rest; in
    validation and test every place is behind the same number. No species and no photograph is in two of the three. A
    species is a subfolder of its class, or an image that lies in the class's folder itself. Cut-outs are scaled,
    mirrored and placed at random, photographs cropped to squares at random; equal seeds draw the same.

    Everything is written to a folder beside ``out``, which takes its name at the end: after an error there is no
    ``out``.

    Args:
        foregrounds: a folder for each class, with images that have an alpha channel.
        backgrounds: a folder for each place, with photographs.
        out: a new folder.
        correlation: how often a training image's place is that of its class.
        images: number of images of ``train``, ``val`` and ``test``, in equal parts of each class; absent ones are
            1000, 200 and 400.
        img_size: height and width in pixels.
        seed: 0 to 2**63 - 1.

    Returns:
        What ``composition.json`` in ``out`` holds: classes, places, settings, and for each split the names and the
        number of its species and photographs and the images of each group.

    Raises:
        UsageError: a bad argument, another number of classes than of places, fewer than three species of a class or
            photographs of a place, a cut-out without an alpha channel or without an opaque pixel, an image that cannot
            be decoded, or a place that cannot be written.
    """
    counts = _checked(correlation, images, img_size, seed)
    out = Path(out)
    if path_exists(out):
        raise usage_error("out", "a new folder", f"{out}, which exists", "choose another name")
    classes = _sources("foregrounds", Path(foregrounds), "species")
    places = _sources("backgrounds", Path(backgrounds), "photographs")
    if len(classes) != len(places):
        got = f"{', '.join(classes)} and {', '.join(places)}"
        hint = "each place belongs to the class of the same rank by name"
        raise usage_error("backgrounds", "as many places as classes", got, hint)
    generator = torch.Generator().manual_seed(seed)
    dealt = [_deal(kind, generator) for kind in (classes, places)]
    record: dict[str, Any] = {
        "classes": list(classes),
        "places": list(places),
        "correlation": correlation,
        "img_size": img_size,
        "seed": seed,
        "splits": {},
    }
    pairs = []
    for number, split in enumerate(SHARES):
        agreement = correlation if split == "train" else 1 / len(classes)
        drawn = _pairs(counts[split], len(classes), agreement, stream(generator, split))
        pairs += [(split, number, y, place) for y, place in drawn]
        record["splits"][split] = {
            "species": _named(dealt[0], classes, split),
            "photographs": _named(dealt[1], places, split),
            "images": {
                f"{name} + {place}": drawn.count((y, p))
                for y, name in enumerate(classes)
                for p, place in enumerate(places)
            },
        }
    draw = _Draw(dealt[0], dealt[1], list(classes), img_size, generator)
    _write(out, pairs, draw, record)
    return record


@dataclass(frozen=True)
class _Source:
    """A species, with all its cut-outs, or a photograph."""

    name: str
    files: tuple[Path, ...]


_Dealt = Mapping[str, Sequence[Sequence[_Source]]]
"""By split, for each class or place: the sources that are the split's own."""


def _checked(
    correlation: float, images: Mapping[str, int] | None, img_size: int, seed: int
) -> dict[str, int]:
    """Check the numbers, and return the images of each split."""
    fraction = isinstance(correlation, (int, float)) and not isinstance(correlation, bool)
    if not (fraction and 0 <= correlation <= 1):
        raise usage_error("correlation", "a number in [0, 1]", repr(correlation), "try 0.95")
    counts = {**IMAGES, **(images or {})}
    limits = {
        **dict.fromkeys(counts, (4, 10**6)),
        "img_size": (8, 4096),
        "seed": (0, 2**63 - 1),
    }
    for name, value in {**counts, "img_size": img_size, "seed": seed}.items():
        if name not in (*IMAGES, "img_size", "seed"):
            raise usage_error("images", f"splits among {', '.join(IMAGES)}", repr(name), "mend it")
        least, most = limits[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            wanted = f"a whole number from {least} to {most}"
            raise usage_error(name, wanted, repr(value), "change it")
    return counts


def _sources(argument: str, folder: Path, what: str) -> dict[str, list[_Source]]:
    """Find the species, or photographs, of each subfolder, by its name."""
    suffixes = require("PIL.Image", extra="train").registered_extensions()

    def files_in(place: Path) -> list[Path]:
        names = (place / name for name in list_names(place) if not name.startswith("."))
        return [path for path in names if path.is_file() and path.suffix.lower() in suffixes]

    def folders_in(place: Path) -> list[Path]:
        names = (place / name for name in list_names(place) if not name.startswith("."))
        return [path for path in names if path.is_dir()]

    if not folder.is_dir():
        raise usage_error(argument, "a folder", f"{folder}, which is none", "check the path")
    found = {}
    for kind in folders_in(folder):
        sources = [_Source(path.name, (path,)) for path in files_in(kind)]
        for below in folders_in(kind):
            files = files_in(below)
            grouped = what == "species" and files
            sources += [_Source(below.name, tuple(files))] if grouped else []
            sources += [] if grouped else [_Source(f"{below.name}/{f.name}", (f,)) for f in files]
        for source in sources:
            if not _is_text(f"{kind.name}/{source.name}"):
                got = repr(f"{kind / source.name}")
                raise usage_error(argument, "names in UTF-8", got, "rename it")
        if len(sources) < _FEWEST:
            wanted = f"at least {_FEWEST} {what} in {kind}, one for each split"
            raise usage_error(argument, wanted, len(sources), "add some")
        found[kind.name] = sources
    if len(found) < 2:
        got = f"{len(found)} in {folder}"
        raise usage_error(argument, "at least two folders with images", got, "one for each class")
    return found


def _is_text(name: str) -> bool:
    try:
        return bool(name.encode("utf-8"))
    except UnicodeEncodeError:  # bytes that are no text
        return False


def _deal(kinds: Mapping[str, Sequence[_Source]], generator: torch.Generator) -> _Dealt:
    """Deal the sources of each kind to the splits: their shares of them, and at least one."""
    dealt: dict[str, list[list[_Source]]] = {split: [] for split in SHARES}
    for kind, sources in kinds.items():
        order = torch.randperm(len(sources), generator=stream(generator, f"sources/{kind}"))
        sizes = {split: max(1, int(share * len(sources))) for split, share in SHARES.items()}
        sizes["test"] = len(sources) - sizes["train"] - sizes["val"]
        begun = 0
        for split, size in sizes.items():
            dealt[split].append([sources[i] for i in order[begun : begun + size].tolist()])
            begun += size
    return dealt


def _named(dealt: _Dealt, kinds: Mapping[str, Any], split: str) -> dict[str, Any]:
    return {
        kind: {"count": len(sources), "names": sorted(source.name for source in sources)}
        for kind, sources in zip(kinds, dealt[split], strict=True)
    }


def _pairs(
    count: int, kinds: int, correlation: float, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Draw ``(class, place)`` of each image of a split, in random order, in exact proportions.

    Every class has an equal part; the places that are not the class's own share what it leaves.
    """
    pairs = []
    for y in range(kinds):
        size = (count + kinds - 1 - y) // kinds
        agreeing = round(correlation * size)
        others = [place for place in range(kinds) if place != y]
        pairs += [(y, y)] * agreeing
        pairs += [(y, others[i % len(others)]) for i in range(size - agreeing)]
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]


class _Draw:
    """Draws the images of a set, one after the other."""

    def __init__(
        self,
        species: _Dealt,
        photographs: _Dealt,
        classes: Sequence[str],
        img_size: int,
        generator: torch.Generator,
    ):
        self._species, self._photographs, self._size = species, photographs, img_size
        self.classes = classes
        self._generator = stream(generator, "images")
        self._taken: dict[tuple[str, str, int], int] = {}
        self._photograph = lru_cache(_CACHED)(lambda path: open_image(path).convert("RGB"))

    def image(self, split: str, y: int, place: int) -> tuple[Any, str, str]:
        """Return the next image of a class over a place, its species, and its photograph's name."""
        bird = self._next("species", split, y, self._species[split][y])
        scene = self._next("photograph", split, place, self._photographs[split][place])
        cutout = self._placed(bird.files[self._below(len(bird.files))])
        background = self._cropped(self._photograph(scene.files[0]))
        laid = compose(_tensor(cutout)[:3], _tensor(cutout)[3:], _tensor(background))
        return laid, bird.name, scene.name

    def _next(self, kind: str, split: str, number: int, sources: Sequence[_Source]) -> _Source:
        """Take sources in turn, so that all are used alike."""
        taken = self._taken.get((kind, split, number), 0)
        self._taken[kind, split, number] = taken + 1
        return sources[taken % len(sources)]

    def _placed(self, path: Path) -> Any:
        """Scale, mirror and place a cut-out on a transparent square."""
        images = require("PIL.Image", extra="train")
        cutout = open_image(path)
        if "A" not in cutout.getbands():
            hint = "cut the object out and save it with transparency"
            raise usage_error(
                "foregrounds", "images with an alpha channel", f"{path} of mode {cutout.mode}", hint
            )
        cutout = cutout.convert("RGBA")
        box = cutout.getchannel("A").getbbox()
        if box is None:
            raise usage_error("foregrounds", "an opaque pixel", f"none in {path}", "leave it out")
        cutout = cutout.crop(box)
        scale = self._between(*_SIZES) * self._size / max(cutout.size)
        width, height = (max(1, round(scale * side)) for side in cutout.size)
        cutout = cutout.resize((width, height), images.Resampling.BICUBIC)
        if self._below(2):
            cutout = cutout.transpose(images.Transpose.FLIP_LEFT_RIGHT)
        square = images.new("RGBA", (self._size, self._size))
        corner = self._below(self._size - width + 1), self._below(self._size - height + 1)
        square.paste(cutout, corner)
        return square

    def _cropped(self, photograph: Any) -> Any:
        images = require("PIL.Image", extra="train")
        side = max(1, round(self._between(*_CROPS) * min(photograph.size)))
        left, top = (self._below(length - side + 1) for length in photograph.size)
        box, size = (left, top, left + side, top + side), (self._size, self._size)
        square = photograph.resize(size, images.Resampling.BICUBIC, box=box)
        return square.transpose(images.Transpose.FLIP_LEFT_RIGHT) if self._below(2) else square

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self._generator))

    def _between(self, low: float, high: float) -> float:
        share = torch.rand((), generator=self._generator, dtype=torch.float64)
        return low + (high - low) * float(share)


def _tensor(image: Any) -> Tensor:
    """Return an image's pixels, uint8 ``[C, H, W]``."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def _write(
    out: Path, pairs: Sequence[tuple[str, int, int, int]], draw: _Draw, record: Mapping[str, Any]
) -> None:
    """Write the set to a new folder beside ``out`` and rename it; an error leaves nothing of it."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
        partial.mkdir()
        try:
            table = [("img_id", "img_filename", "y", "split", "place", "place_filename")]
            for i, (split, number, y, place) in enumerate(pairs):
                image, species, scene = draw.image(split, y, place)
                name = f"{y + 1:03}.{draw.classes[y]}/{i:06}_{Path(species).stem}.png"
                _write_file(partial / name, _png(image))
                table.append((str(i), name, str(y), str(number), str(place), scene))
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(table)
            _write_file(partial / "metadata.csv", text.getvalue().encode("utf-8"))
            said = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            _write_file(partial / "composition.json", said.encode("utf-8"))
            for path in (
                *partial.rglob("*"),
                partial,
            ):  # once all are written: one commit, not one each
                sync_folder(path)
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(out.parent)


def _png(image: Tensor) -> bytes:
    images = require("PIL.Image", extra="train")
    content = io.BytesIO()
    images.fromarray(image.permute(1, 2, 0).numpy()).save(content, "PNG")
    return content.getvalue()


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
