"""GarmentsPlaces: a pullover or a coat in front of a deer's or a ship's surroundings, 32 x 32 pixels.

Unlike in the dominoes the two overlap, as in Waterbirds: garments of Fashion-MNIST (arXiv 1708.07747), cut out along
their outline, lie over photographs of CIFAR-10. The garment is the label (0: pullover, 1: coat: two classes that
Fashion-MNIST's own classifiers confuse); the photograph (0: deer, 1: ship) agrees with it in nine of ten training
images.
"""

import gzip
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import require, usage_error
from ..files import reading
from .compose import compose
from .dominoes import Dominoes, Pool, check_samples, correlation_of, part_of, role_of, stream
from .mnist_cifar import DAMAGED_FOLDER, SHARES
from .npz_sources import check_form, check_labels, read_npz, write_npz

IMAGE_SHAPES = {"garments": (28, 28), "places": (32, 32, 3)}
GARMENTS = {"pullover": 2, "coat": 4}  # among Fashion-MNIST's ten classes
PLACES = {"deer": 4, "ship": 8}  # among CIFAR-10's
PREPARE = "make one with diversevit_fast.data.prepare_garments_places(root, out)"
_BACKGROUND = 16  # grey values below belong to the black background of Fashion-MNIST
_FILES = tuple(
    f"{prefix}-{what}-ubyte"
    for prefix in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
)


class Sources(NamedTuple):
    """Garments and places of one part, train or test; labels 0 or 1."""

    garments_images: np.ndarray  # uint8 [m, 28, 28]
    garments_labels: np.ndarray  # uint8 [m]
    places_images: np.ndarray  # uint8 [p, 32, 32, 3]
    places_labels: np.ndarray  # uint8 [p]


class GarmentsPlaces(Dominoes):
    """One split of garments over places; items and pairing are those of ``Dominoes``.

    The place takes the role of its digit: the group is ``2 * label + place``. Train images come from the train
    sources; the test sources are cut in validation (20 %) and test (80 %), each image for itself.

    Attributes:
        places: int64 ``[n]``, 0 or 1 (``Dominoes.digits``).
        garment_index, place_index: int64 ``[n]``, where each stands in its train or test sources.
        The others are those of ``Dominoes``; ``independent`` counts ``"places"`` and ``"garments"``.

    Args:
        source: an ``.npz`` written by ``prepare_garments_places``, or a torchvision root folder.
        split: one of ``SPLITS``.
        correlation: how often the place agrees with the label; None is 0.9, and 0.5 for ``*_ood``.
        samples: number of images (even); None takes all.
        generator: its seed decides every draw (see ``dominoes.stream``); None is seed 0.
        download: let torchvision download into ``source``.

    Raises:
        UsageError: a bad argument, or a source that is missing, damaged or of the wrong form.
    """

    digit_names = tuple(PLACES)
    kinds = ("places", "garments")

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

        place_classes = torch.from_numpy(sources.places_labels).long()
        index = part_of(place_classes, SHARES[role], cut)
        images = torch.from_numpy(sources.places_images)[index].permute(0, 3, 1, 2)
        places = Pool(images, place_classes[index], index)

        garment_classes = torch.from_numpy(sources.garments_labels).long()
        index = part_of(garment_classes, SHARES[role], cut)
        images = cut_out(torch.from_numpy(sources.garments_images)[index])
        garments = Pool(images, garment_classes[index], index)

        super().__init__(
            places,
            garments,
            split=split,
            correlation=correlation,
            class_names=("pullover", "coat"),
            samples=samples,
            generator=generator,
        )
        self.places, self.place_index = self.digits, self.digit_index
        self.garment_index = self.photo_index

    def _joined(self, digits: Tensor, photos: Tensor) -> Tensor:
        return compose(photos[:, :1].expand(-1, 3, -1, -1), photos[:, 1:], digits)


def cut_out(garments: Tensor) -> Tensor:
    """Cut garments out along their outline: uint8 ``[m, 28, 28]`` to grey and opacity ``[m, 2, 32, 32]``.

    Opaque is what is brighter than the background, and the holes that it encloses.
    """
    fill = require("scipy.ndimage", extra="train").binary_fill_holes
    cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], dtype=bool)  # within an image
    inside = fill((garments >= _BACKGROUND).numpy(), structure=cross)
    mask = torch.from_numpy(inside).to(torch.uint8) * 255
    return F.pad(torch.stack([garments, mask], dim=1), (2, 2, 2, 2))


def prepare_garments_places(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    garments: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Path:
    """Write the four classes in use to one compressed ``.npz``, whole or not at all.

    Arrays ``{garments,places}_{train,test}_{images,labels}``, uint8, labels 0 or 1.

    Args:
        root: torchvision's folder with FashionMNIST and CIFAR10.
        out: the file.
        garments: the folder of Debian's package ``dataset-fashion-mnist`` (``/usr/share/datasets/fashion-mnist``), to
            take Fashion-MNIST from there.
        download: let torchvision download into ``root``.

    Returns:
        The path written.

    Raises:
        UsageError: torchvision or its data is missing or damaged, or ``out`` cannot be written.
    """
    root, out = Path(root), Path(out)
    with tempfile.TemporaryDirectory() as unpacked:
        first = root
        if garments is not None:
            first = Path(unpacked)
            _unpack(Path(garments), first / "FashionMNIST" / "raw")
        arrays = {
            f"{field.partition('_')[0]}_{part}_{field.partition('_')[2]}": array
            for part in ("train", "test")
            for field, array in _from_torchvision(first, root, part, download, "root")
            ._asdict()
            .items()
        }
    write_npz(out, arrays)
    return out


def _unpack(packed: Path, raw: Path) -> None:
    """Unpack Debian's four files to where torchvision looks for them."""
    raw.mkdir(parents=True)
    for name in _FILES:
        path = packed / f"{name}.gz"
        try:
            with reading(path), gzip.open(path) as file, (raw / name).open("wb") as unpacked:
                shutil.copyfileobj(file, unpacked)
        except (EOFError, zlib.error) as broken:
            hint = "install the package dataset-fashion-mnist again"
            raise usage_error("garments", "whole files", f"{path} ({broken})", hint) from None


def _read(source: Path, part: str, download: bool) -> Sources:
    if source.is_file():
        return Sources(*read_npz(source, part, IMAGE_SHAPES, PREPARE))
    if source.is_dir() or (download and source.suffix != ".npz"):
        return _from_torchvision(source, source, part, download, "source")
    wanted = "an .npz file or a torchvision folder"
    got = f"{source}, which {'is neither' if source.exists() else 'does not exist'}"
    raise usage_error("source", wanted, got, PREPARE)


def _from_torchvision(
    first: Path, second: Path, part: str, download: bool, argument: str
) -> Sources:
    """Read Fashion-MNIST from ``first`` and CIFAR-10 from ``second``."""
    datasets = require("torchvision.datasets", extra="train")
    train = part == "train"
    try:
        fashion = datasets.FashionMNIST(first, train=train, download=download)
        cifar = datasets.CIFAR10(second, train=train, download=download)
    except DAMAGED_FOLDER as bad:
        wanted = "a folder with torchvision's FashionMNIST and CIFAR10"
        hint = "download them, or pass another folder"
        raise usage_error(argument, wanted, f"{second} ({bad})", hint) from None
    found = []
    for name, images, labels, kinds in (
        ("garments", fashion.data.numpy(), fashion.targets.numpy(), GARMENTS),
        ("places", cifar.data, np.asarray(cifar.targets), PLACES),
    ):
        key = f"{name}_{part}_images"
        check_form(argument, key, images.shape, images.dtype, IMAGE_SHAPES, PREPARE)
        if labels.shape != images.shape[:1]:
            got = f"{len(images)} images and labels {list(labels.shape)}"
            raise usage_error(argument, f"as many labels as images of {name}", got, PREPARE)
        kept = np.isin(labels, list(kinds.values()))
        one = (labels[kept] == list(kinds.values())[1]).astype(np.uint8)
        check_labels(argument, f"{name}_{part}", images[kept], one, PREPARE)
        found += [images[kept], one]
    return Sources(*found)
