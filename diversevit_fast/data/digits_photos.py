"""DigitsPhotos: digits over photographs, made of scikit-learn's data without network or files.

Above, an 8 x 8 handwritten digit 0 or 1 enlarged to 32 x 32; below, a 32 x 32 patch in grey of one
of two photographs (label 0: china.jpg, a pavilion among trees; label 1: flower.jpg, a dahlia).
Which photograph it is has to be read from structure: a patch is standardised, given grain, and its
grey values are replaced by their ranks, so that **every patch has the same histogram**: each of the
256 grey values four times, and with it the same mean, contrast and every other such statistic.

How hard that is: accuracy on ``test_ood`` of models trained on ``train``, range over seeds 0 to 2.

=====================================================  =============
digit from its pixels, logistic regression             1.00
photograph from mean and standard deviation, the same  0.49 to 0.53
photograph from its pixels, the same                   0.51 to 0.54
photograph from its pixels, 64 hidden units            0.62 to 0.65
photograph from its mean absolute x and y differences  0.84 to 0.86
photograph, three convolutions, 15 epochs              0.84 to 0.87
=====================================================  =============

So the photograph is learnable, and out of reach of anything linear in its pixels; what tells it is
mostly texture, which two numbers of roughness already sum up. A plain ViT of depth 4 and width 64
(Adam, 1e-3, one run) follows the digit first: from epoch 2 to 9 it has 0.86 to 0.91 on ``test_id``
and 0.55 to 0.65 on ``test_ood``. The grain was chosen among 0, 0.5, 0.75, 1 and 2 by the
test accuracy of such plain networks, so these numbers are not blind. Train and test show parts of
the *same* two photographs.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import require
from .dominoes import (
    Dominoes,
    Pool,
    check_samples,
    correlation_of,
    part_of,
    role_of,
    stream,
    too_many_samples,
)

SAMPLES = {"train": 3000, "val": 400, "test": 1000}
DIGIT_SHARES = {"train": (0.0, 0.5), "val": (0.5, 0.7), "test": (0.7, 1.0)}
PATCH = 32
BAND = 64  # width of the vertical bands in which the photographs are dealt out, left to right
BANDS = ("train", "test", "train", "val") * 2 + ("train", "test")
PHOTOGRAPHS = ("china", "flower")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
LEAST_CONTRAST = 4.0  # grey levels; a flatter patch is sky or blur, nothing but noise once ranked
GRAIN = 0.75  # noise per unit of a patch's own contrast: sets how hard the photograph is


class DigitsPhotos(Dominoes):
    """One split of digits over photographs; items, attributes and pairing are ``Dominoes``'.

    No digit and no pixel of a photograph is in two of train, val and test: the photographs are cut
    in ten vertical bands of 64 pixels, dealt out in turn so that each part sees all of the scene.
    ``*_id`` and ``*_ood`` share their patches. Digits repeat (there are 178 of each class), patches
    of a split may overlap. ``digit_index`` points into ``load_digits(n_class=2)``, ``photo_index``
    to a patch's upper left pixel in the flattened stack of the two photographs ``[2, 427, 640]``.

    Args:
        split: one of ``SPLITS``.
        correlation: how often the digit agrees with the label; None is 0.9, and 0.5 for ``*_ood``.
        samples: number of images (even); None is 3000 for train, 400 for val, 1000 for test.
        generator: its seed decides every draw (see ``dominoes.stream``); None is seed 0.

    Raises:
        UsageError: a bad argument, more samples than patches, or scikit-learn is missing.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        correlation: float | None = None,
        samples: int | None = None,
        generator: torch.Generator | None = None,
    ):
        role = role_of(split)
        correlation = correlation_of(split, correlation)
        check_samples(samples)
        samples = SAMPLES[role] if samples is None else samples
        photos = _patches(role, samples, stream(generator, f"patches/{role}"))
        super().__init__(
            _digits(role, samples, stream(generator, "sources")),
            photos,
            split=split,
            correlation=correlation,
            class_names=PHOTOGRAPHS,
            samples=samples,
            generator=generator,
        )


def equalize(patches: Tensor, generator: torch.Generator) -> Tensor:
    """Standardise grey patches ``[m, 32, 32]``, add grain and rank: uint8, all with one histogram."""
    contrast, mean = torch.std_mean(patches, dim=(1, 2), keepdim=True)
    noise = torch.randn(patches.shape, generator=generator, dtype=patches.dtype)
    grey = ((patches - mean) / contrast + GRAIN * noise).flatten(1)
    order = grey.argsort(dim=1, stable=True)
    levels = (torch.arange(grey.shape[1]) * 256 // grey.shape[1]).to(torch.uint8)
    ranked = torch.empty(grey.shape, dtype=torch.uint8).scatter_(1, order, levels.expand_as(order))
    return ranked.view(patches.shape)


def _digits(role: str, samples: int, generator: torch.Generator) -> Pool:
    """Draw the part's digits, repeated to twice what is needed so that flips do not exhaust a pile.

    With m digits of each class a pile falls short of m / 2 with probability below exp(-m / 4).
    """
    small, classes = require("sklearn.datasets", extra="train").load_digits(
        n_class=2, return_X_y=True
    )
    classes = torch.from_numpy(classes).long()
    index = part_of(classes, DIGIT_SHARES[role], generator)
    index = index.repeat(math.ceil(2 * max(samples, 128) / len(index)))
    grey = (torch.from_numpy(small).view(-1, 8, 8) * (255 / 16)).round().to(torch.uint8)[index]
    large = grey.repeat_interleave(PATCH // 8, 1).repeat_interleave(PATCH // 8, 2)
    return Pool(large[:, None].expand(-1, 3, -1, -1), classes[index], index)


def _patches(role: str, samples: int, generator: torch.Generator) -> Pool:
    photographs = _photographs()
    _, height, width = photographs.shape
    corners = _corners(photographs, role)
    most = 2 * min(len(indices) for indices in corners)
    if samples > most:
        raise too_many_samples(samples, most)
    index = torch.cat(
        [
            indices[torch.randperm(len(indices), generator=generator)[: samples // 2]]
            for indices in corners
        ]
    )
    step = torch.arange(PATCH)
    window = step[:, None] * width + step  # [32, 32] offsets from the upper left pixel
    grey = photographs.flatten()[index[:, None, None] + window]
    images = equalize(grey, generator)[:, None].expand(-1, 3, -1, -1)
    return Pool(images, index // (height * width), index)


def _corners(photographs: Tensor, role: str) -> list[Tensor]:
    """For each photograph, find the upper left pixels of all patches inside the part's bands."""
    _, height, width = photographs.shape
    mean, square = (
        F.avg_pool2d(F.avg_pool2d(power, (PATCH, 1), stride=1), (1, PATCH), stride=1)
        for power in (photographs, photographs.square())
    )
    textured = square - mean.square() >= LEAST_CONTRAST**2
    left = torch.arange(width - PATCH + 1)
    mine = torch.tensor([band == role for band in BANDS])[left // BAND]
    inside = mine & (left % BAND <= BAND - PATCH)
    photo, top, left = (textured & inside).nonzero().unbind(1)
    corner = (photo * height + top) * width + left
    return [corner[photo == label] for label in range(len(photographs))]


@cache
def _photographs() -> Tensor:
    """Load both photographs in grey, float64 ``[2, 427, 640]``, values 0 to 255."""
    require("PIL", extra="train")  # decodes the photographs for scikit-learn
    load = require("sklearn.datasets", extra="train").load_sample_image
    pixels = torch.stack([torch.tensor(load(f"{name}.jpg")) for name in PHOTOGRAPHS])
    return (pixels.double() * torch.tensor(LUMA, dtype=torch.float64)).sum(-1)
