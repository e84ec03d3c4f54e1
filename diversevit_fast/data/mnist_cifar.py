"""MNISTCIFAR: dominoes of MNIST and CIFAR-10, the paper's benchmark (arXiv 2308.16274), 64 x 32 pixels.

A digit 0 or 1, zero-padded from 28 to 32 pixels and repeated to three channels, above an
automobile (label 0) or a truck (label 1). Train images come from the train sources; the test
sources are cut in validation (20 %) and test (80 %).
"""

import os
import pickle
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import require, usage_error
from .dominoes import Dominoes, Pool, check_samples, correlation_of, part_of, role_of, stream
from .npz_sources import check_form, check_labels, keys_of, read_npz, write_npz

SHARES = {"train": (0.0, 1.0), "val": (0.0, 0.2), "test": (0.2, 1.0)}
AUTOMOBILE, TRUCK = 1, 9  # among CIFAR-10's ten classes
IMAGE_SHAPES = {"mnist": (28, 28), "cifar": (32, 32, 3)}
KEYS = keys_of(IMAGE_SHAPES)
DAMAGED_FOLDER = (  # the same for torchvision; a failed download is an OSError
    *(OSError, EOFError, ValueError, RuntimeError, AssertionError, LookupError),
    *(ArithmeticError, AttributeError, TypeError, ImportError, zlib.error, struct.error),
    pickle.PickleError,
)
PREPARE = "make one with diversevit_fast.data.prepare_mnist_cifar(root, out, download=True)"


class Sources(NamedTuple):
    """Digits and photographs of one part, train or test; labels 0 or 1."""

    mnist_images: np.ndarray  # uint8 [m, 28, 28]
    mnist_labels: np.ndarray  # uint8 [m]
    cifar_images: np.ndarray  # uint8 [p, 32, 32, 3]
    cifar_labels: np.ndarray  # uint8 [p]


class MNISTCIFAR(Dominoes):
    """One split of MNIST-CIFAR; items, attributes and pairing are those of ``Dominoes``.

    ``digit_index`` and ``photo_index`` point into the train sources for ``train`` and into the
    test sources for the four others.

    Args:
        source: an ``.npz`` written by ``prepare_mnist_cifar``, or a torchvision root folder.
        split: one of ``SPLITS``.
        correlation: how often the digit agrees with the label; None is 0.9, and 0.5 for ``*_ood``.
        samples: number of images (even); None takes all.
        generator: its seed decides every draw (see ``dominoes.stream``); None is seed 0.
        download: let torchvision download into ``source``.

    Raises:
        UsageError: a bad argument, or a source that is missing, damaged or of the wrong form.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        split: str = "train",
        *,
        correlation: float | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
        download: bool = False,
    ):
        role = role_of(split)
        correlation = correlation_of(split, correlation)
        check_samples(samples)
        cut = stream(generator, "sources")
        sources = _read(Path(source), "train" if role == "train" else "test", download)

        digit_classes = torch.from_numpy(sources.mnist_labels).long()
        index = part_of(digit_classes, SHARES[role], cut)
        images = F.pad(torch.from_numpy(sources.mnist_images)[index], (2, 2, 2, 2))
        digits = Pool(images[:, None].expand(-1, 3, -1, -1), digit_classes[index], index)

        photo_classes = torch.from_numpy(sources.cifar_labels).long()
        index = part_of(photo_classes, SHARES[role], cut)
        images = torch.from_numpy(sources.cifar_images)[index].permute(0, 3, 1, 2)
        photos = Pool(images, photo_classes[index], index)

        super().__init__(
            digits,
            photos,
            split=split,
            correlation=correlation,
            class_names=("automobile", "truck"),
            samples=samples,
            generator=generator,
        )


def prepare_mnist_cifar(
    root: str | os.PathLike[str], out: str | os.PathLike[str], download: bool = False
) -> Path:
    """Write the four classes in use from a torchvision folder to one compressed ``.npz``.

    Arrays ``{mnist,cifar}_{train,test}_{images,labels}``, uint8, labels 0 or 1. The file appears
    whole or not at all, and has the same bytes every time.

    Returns:
        The path written.

    Raises:
        UsageError: torchvision or its data is missing, or ``out`` cannot be written.
    """
    root, out = Path(root), Path(out)
    arrays = {
        f"{field.partition('_')[0]}_{part}_{field.partition('_')[2]}": array
        for part in ("train", "test")
        for field, array in _from_torchvision(root, part, download, "root")._asdict().items()
    }
    write_npz(out, arrays)
    return out


def _read(source: Path, part: str, download: bool) -> Sources:
    if source.is_file():
        return Sources(*read_npz(source, part, IMAGE_SHAPES, PREPARE))
    if source.is_dir() or (download and source.suffix != ".npz"):
        return _from_torchvision(source, part, download, "source")
    wanted = "an .npz file or a torchvision folder"
    got = f"{source}, which {'is neither' if source.exists() else 'does not exist'}"
    raise usage_error("source", wanted, got, PREPARE)


def _from_torchvision(root: Path, part: str, download: bool, argument: str) -> Sources:
    datasets = require("torchvision.datasets", extra="train")
    train = part == "train"
    try:
        mnist = datasets.MNIST(root, train=train, download=download)
        cifar = datasets.CIFAR10(root, train=train, download=download)
    except DAMAGED_FOLDER as bad:
        hint = "pass download=True, or another folder"
        raise usage_error(
            argument, "a folder with torchvision's MNIST and CIFAR-10", f"{root} ({bad})", hint
        ) from None
    digit_classes, photo_classes = mnist.targets.numpy(), np.asarray(cifar.targets)
    for name, images, labels in (
        ("mnist", mnist.data.numpy(), digit_classes),
        ("cifar", cifar.data, photo_classes),
    ):
        key = f"{name}_{part}_images"
        check_form(argument, key, images.shape, images.dtype, IMAGE_SHAPES, PREPARE)
        if labels.shape != images.shape[:1]:
            got = f"{len(images)} images and labels {list(labels.shape)}"
            raise usage_error(argument, f"as many labels as images in {name}", got, PREPARE)
    digits, photos = digit_classes <= 1, np.isin(photo_classes, (AUTOMOBILE, TRUCK))
    sources = Sources(
        mnist.data.numpy()[digits],
        digit_classes[digits].astype(np.uint8),
        cifar.data[photos],
        (photo_classes[photos] == TRUCK).astype(np.uint8),
    )
    check_labels(argument, f"mnist_{part}", sources.mnist_images, sources.mnist_labels, PREPARE)
    check_labels(argument, f"cifar_{part}", sources.cifar_images, sources.cifar_labels, PREPARE)
    return sources
