"""Build all five splits of a data set, by its name."""

import os
import reprlib
from collections.abc import Mapping

import torch

from ..errors import usage_error
from .digits_photos import DigitsPhotos
from .dominoes import SPLITS, Dominoes, role_of
from .mnist_cifar import MNISTCIFAR, PREPARE

NAMES = ("digits-photos", "mnist-cifar")


def load_splits(
    name: str,
    *,
    source: str | os.PathLike[str] | None = None,
    seed: int = 0,
    correlation: float | None = None,
    samples: int | Mapping[str, int] | None = None,
    download: bool = False,
) -> dict[str, Dominoes]:
    """Build the five ``SPLITS`` of a data set from one seed.

    Args:
        name: ``digits-photos`` or ``mnist-cifar``.
        source: where MNIST-CIFAR's images are (``MNISTCIFAR``); digits-photos takes none.
        seed: 0 to 2**63 - 1.
        correlation: of train, val_id and test_id; None is 0.9. The ``*_ood`` splits keep 0.5.
        samples: images per split: one number for all, or a number by split; None is the default
            size of each split.
        download: let torchvision download into ``source``.

    Raises:
        UsageError: a bad argument, or a source that is missing or damaged.
    """
    if name not in NAMES:
        raise usage_error("name", f"one of {', '.join(NAMES)}", repr(name), "pick one of these")
    if not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63):
        raise usage_error(
            "seed", "an integer from 0 to 2**63 - 1", reprlib.repr(seed), "pass such a number"
        )
    if name == "mnist-cifar" and source is None:
        raise usage_error("source", "an .npz file or a torchvision folder", "None", PREPARE)
    if name == "digits-photos" and source is not None:
        raise usage_error(
            "source", "nothing for digits-photos", source, "leave it out, or name mnist-cifar"
        )
    if isinstance(samples, Mapping):
        for split in samples:
            role_of(split)
        sizes: dict[str, int | None] = dict(samples)
    else:
        sizes = {} if samples is None else dict.fromkeys(SPLITS, samples)

    def load(split: str) -> Dominoes:
        generator = torch.Generator().manual_seed(seed)
        agreement = None if split.endswith("_ood") else correlation
        size = sizes.get(split)
        if source is None:
            return DigitsPhotos(split, correlation=agreement, samples=size, generator=generator)
        return MNISTCIFAR(
            source,
            split,
            correlation=agreement,
            samples=size,
            generator=generator,
            download=download,
        )

    return {split: load(split) for split in SPLITS}
