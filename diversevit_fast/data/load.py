"""Build all five splits of a data set, by its name."""

import os
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import usage_error
from . import garments_places
from .digits_photos import DigitsPhotos
from .dominoes import IMAGE_SIZE, SPLITS, Dominoes, role_of, stream
from .garments_places import GarmentsPlaces
from .group_images import check_img_size, check_memory, folder_images
from .label_noise import check_label_noise, noisy_labels
from .mnist_cifar import MNISTCIFAR, PREPARE

NAMES = ("digits-photos", "mnist-cifar", "garments-places", "folder")
FIXED_SIZES: Mapping[str, tuple[int, int]] = {
    "digits-photos": IMAGE_SIZE,
    "mnist-cifar": IMAGE_SIZE,
    "garments-places": (32, 32),
}
"""Height and width in pixels where they are known before the data are read."""

_PREPARED = {
    "mnist-cifar": (MNISTCIFAR, PREPARE),
    "garments-places": (GarmentsPlaces, garments_places.PREPARE),
}


def load_splits(
    name: str,
    *,
    source: str | os.PathLike[str] | None = None,
    seed: int = 0,
    correlation: float | None = None,
    samples: int | Mapping[str, int] | None = None,
    download: bool = False,
    metadata: str | os.PathLike[str] | None = None,
    img_size: int | None = None,
    label_noise: float | None = None,
) -> dict[str, Any]:
    """Build the five ``SPLITS`` of a data set from one seed.

    Args:
        name: ``digits-photos``, ``mnist-cifar``, ``garments-places``, or ``folder``: images whose groups a CSV file
            names.
        source: where the images are (``MNISTCIFAR``, ``GarmentsPlaces``, ``folder_images``); digits-photos takes none.
        seed: 0 to 2**63 - 1.
        correlation: of train, val_id and test_id; None is 0.9. The ``*_ood`` splits keep 0.5. A folder has its own.
        samples: images per split: one number for all, or a number by split; None is the default
            size of each split.
        download: let torchvision download into ``source``.
        metadata: the CSV file of a folder; see ``folder_images``.
        img_size: height and width in pixels to which images are resized, once and bilinearly, without keeping their
            aspect ratio; None keeps the data set's own size.
        label_noise: the fraction of the training images that have the label of another class; None is 0. Their groups
            stay those of the true labels. All other splits keep their labels.

    Raises:
        UsageError: a bad argument, or a source that is missing or damaged.
    """
    if name not in NAMES:
        raise usage_error("name", f"one of {', '.join(NAMES)}", repr(name), "pick one of these")
    if not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63):
        raise usage_error(
            "seed", "an integer from 0 to 2**63 - 1", reprlib.repr(seed), "pass such a number"
        )
    if name in _PREPARED and source is None:
        hint = _PREPARED[name][1]
        raise usage_error("source", "an .npz file or a torchvision folder", "None", hint)
    if name == "folder" and source is None:
        hint = "name the folder that holds the images and their CSV file"
        raise usage_error("source", "a folder of images", "None", hint)
    if name == "digits-photos" and source is not None:
        raise usage_error(
            "source", "nothing for digits-photos", source, "leave it out, or name other data"
        )
    if name != "folder" and metadata is not None:
        raise usage_error(
            "metadata", f"nothing for {name}", metadata, "leave it out, or name folder"
        )
    check_img_size(img_size)
    check_label_noise(label_noise)
    if isinstance(samples, Mapping):
        for split in samples:
            role_of(split)
        sizes: dict[str, int | None] = dict(samples)
    else:
        sizes = {} if samples is None else dict.fromkeys(SPLITS, samples)
    if name == "folder":
        for option, given in (("correlation", correlation is not None), ("download", download)):
            if given:
                hint = "leave it out: a folder has the images that its CSV file lists"
                raise usage_error(option, "nothing for folder", correlation or download, hint)
        assert source is not None
        generator = torch.Generator().manual_seed(seed)
        splits: dict[str, Any] = {
            **folder_images(source, metadata, img_size=img_size, samples=sizes, generator=generator)
        }
        return _with_wrong_labels(splits, label_noise, seed)

    def load(split: str) -> Dominoes:
        generator = torch.Generator().manual_seed(seed)
        agreement = None if split.endswith("_ood") else correlation
        size = sizes.get(split)
        if source is None:
            return DigitsPhotos(split, correlation=agreement, samples=size, generator=generator)
        return _PREPARED[name][0](
            source,
            split,
            correlation=agreement,
            samples=size,
            generator=generator,
            download=download,
        )

    splits = {split: load(split) for split in SPLITS}
    if img_size is not None:
        check_memory(sum(map(len, splits.values())), (img_size, img_size))
        for split in splits.values():
            split.images = F.interpolate(
                split.images, (img_size, img_size), mode="bilinear", antialias=True
            )
            split.image_size = (img_size, img_size)
    return _with_wrong_labels(splits, label_noise, seed)


def _with_wrong_labels(splits: dict[str, Any], fraction: float | None, seed: int) -> dict[str, Any]:
    """Return the splits, a fraction of the labels of ``train`` replaced."""
    if fraction:
        generator = stream(torch.Generator().manual_seed(seed), "label noise")
        train = splits["train"]
        train.labels = noisy_labels(train.labels, fraction, train.num_classes, generator)
    return splits
