"""Prepared images in an ``.npz``: read with every check, and written.

Arrays ``{name}_{train,test}_{images,labels}`` of two kinds of images, uint8, labels 0 or 1.
"""

import lzma
import reprlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, usage_error
from ..files import FileError, reading, write_atomically, writing

DAMAGED_NPZ = (  # what zipfile and numpy raise for broken files, found by breaking them
    *(OSError, EOFError, ValueError, RuntimeError, SyntaxError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error),
    *(ArithmeticError, LookupError, TypeError, lzma.LZMAError),
)
MOST_IMAGES = 10**6  # of one array: CIFAR-10 and MNIST have 60,000 each

Shapes = Mapping[str, tuple[int, ...]]


def keys_of(shapes: Shapes) -> tuple[str, ...]:
    """Return the names of the arrays in a file with such images."""
    return tuple(
        f"{name}_{part}_{what}"
        for name in shapes
        for part in ("train", "test")
        for what in ("images", "labels")
    )


def read_npz(path: Path, part: str, shapes: Shapes, hint: str) -> list[np.ndarray]:
    """Read the arrays of one part of an ``.npz``, in the order of ``keys_of``.

    Args:
        path: the file.
        part: ``"train"`` or ``"test"``.
        shapes: the shape of an image, by the name of each kind of images.
        hint: what to do about a wrong file.

    Raises:
        UsageError: no such archive, a damaged one, or arrays that are missing or of another form.
    """
    keys = keys_of(shapes)
    wanted = [key for key in keys if part in key.split("_")]
    with reading(path), path.open("rb") as file:
        archive = zipfile.is_zipfile(file)
    if not archive:
        raise usage_error("source", "an .npz archive", f"{path}, no whole zip archive", hint)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            absent = [key for key in keys if key not in stored]
            if absent:
                listed, missing = ", ".join(keys), ", ".join(absent)
                raise usage_error("source", f"arrays {listed}", f"no {missing}", hint)
            for key in wanted:
                check_form("source", key, *_header(stored.zip, key), shapes, hint)
            arrays = [stored[key] for key in wanted]
    except UsageError:
        raise
    except MemoryError:
        with reading(path):  # not the file's fault either
            raise
    except DAMAGED_NPZ as broken:
        if isinstance(broken, OSError) and broken.errno:
            with reading(path):  # the system's fault, not the file's
                raise
        raise usage_error("source", "a readable .npz archive", f"{path} ({broken})", hint) from None
    for name, images, labels in zip(shapes, arrays[::2], arrays[1::2], strict=True):
        check_labels("source", f"{name}_{part}", images, labels, hint)
    return arrays


def _header(archive: Any, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Read the shape and dtype of an array in an ``.npz`` from its header alone."""
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}
        shape, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(file)
    if dtype.hasobject:
        raise ValueError(f"{key} holds Python objects, which are not loaded")
    return shape, dtype


def check_form(
    argument: str,
    key: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    shapes: Shapes,
    hint: str,
) -> None:
    """Check shape and dtype of the array ``key``.

    Raises:
        UsageError: they are others, or there are more images than any known data set has.
    """
    tail = shapes[key.partition("_")[0]] if key.endswith("images") else ()
    if dtype != np.uint8 or len(shape) != 1 + len(tail) or shape[1:] != tail:
        listed = ", ".join(["n", *map(str, tail)])
        got = f"{dtype} {reprlib.repr(list(shape))}"
        raise usage_error(argument, f"{key} as uint8 [{listed}]", got, hint)
    if not 0 <= shape[0] <= MOST_IMAGES:
        wanted = f"at most {MOST_IMAGES} items in {key}"
        raise usage_error(argument, wanted, reprlib.repr(shape[0]), hint)


def check_labels(
    argument: str, name: str, images: np.ndarray, labels: np.ndarray, hint: str
) -> None:
    """Check that there is a label 0 or 1 for each image, and images of both.

    Raises:
        UsageError: there are not.
    """
    if len(images) != len(labels):
        got = f"{len(images)} images and {len(labels)} labels"
        raise usage_error(argument, f"as many {name}_images as {name}_labels", got, hint)
    if labels.size and labels.max() > 1:
        got = f"values up to {labels.max()}"
        raise usage_error(argument, f"{name}_labels of 0 or 1", got, hint)
    counts = np.bincount(labels, minlength=2)
    if counts.min() == 0:
        got = f"{counts[0]} and {counts[1]}"
        raise usage_error(argument, f"{name} images of both classes", got, hint)


def write_npz(out: Path, arrays: Mapping[str, Any]) -> None:
    """Write a compressed ``.npz``, whole or not at all, with the same bytes every time.

    Raises:
        UsageError: ``out`` cannot be written.
    """
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda file: np.savez_compressed(file, **arrays))
    except FileError as refused:
        got = f"{out} ({refused.reason})"
        raise usage_error("out", "a writable path", got, "pick another") from None
