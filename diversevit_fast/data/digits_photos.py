"""DigitsPhotos: digits over photographs, made of scikit-learn's data without network or files.

Above, an 8 x 8 handwritten digit 0 or 1 enlarged to 32 x 32; below, a 16 x 16 tile in grey of one of
two photographs (label 0: china.jpg, a pavilion among trees; label 1: flower.jpg, a dahlia), enlarged
to 32 x 32. Which photograph it is has to be read from structure: a tile is standardised, given grain,
and its grey values are replaced by their ranks, so that **every tile has the same histogram**: each of
the 256 grey values four times, and with it the same mean, contrast and every other such statistic.

How hard that is: accuracy on ``test_ood`` of models trained on ``train``, range over data seeds 0 to 2.

=====================================================  =============
digit from its pixels, logistic regression             1.00
photograph from mean and standard deviation, the same  0.50
photograph from its pixels, the same                   0.45 to 0.56
photograph from its pixels, 64 hidden units            0.67 to 0.77
photograph from its mean absolute x and y differences  0.74 to 0.78
photograph, three convolutions, 15 epochs              0.81 to 0.87
=====================================================  =============

So the photograph is learnable, and out of reach of anything linear in its pixels; part of what tells
it is texture, which two numbers of roughness sum up. The grain was chosen among 0.25, 0.5 and 0.75,
the size of a tile among 16, 24 and 32, with such plain networks on parts of the same photographs, so
these numbers are not blind. Train and test show parts of the *same* two photographs.
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

SAMPLES = {"train": 3000, "val": 160, "test": 320}
SHARES = {"train": (0.0, 0.4), "val": (0.4, 0.6), "test": (0.6, 1.0)}  # of digits, and of cells
SIDE = 32  # of an image's two halves
TILE = 16  # side of the square that is cut out of a photograph, then enlarged
CELL = 2 * TILE  # side of the squares that are dealt out to train, val and test
PHOTOGRAPHS = ("china", "flower")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
LEAST_CONTRAST = 4.0  # grey levels; a flatter tile is sky or blur, nothing but noise once ranked
REPEATS = {"train": 1, "val": 16, "test": 16}  # how often a tile may return, with new grain
GRAIN = 0.25  # noise per unit of a tile's own contrast: sets how hard the photograph is


class DigitsPhotos(Dominoes):
    """One split of digits over photographs; items, attributes and pairing are ``Dominoes``'.

    No digit and no pixel of a photograph is in two of train, val and test. The photographs are cut in
    cells of 32 x 32 pixels, which the seed deals out: 40 % to train, 20 % to val, 40 % to test. Val
    and test see the same kind of places, and each shows the 16 x 16 tiles of its cells, four to a
    cell, which do not overlap. Train shows any square of 16 x 16 pixels in its cells. ``*_id`` and
    ``*_ood`` share their tiles. Digits (there are 178 of each class) return, and so do the tiles of val
    and test where more images are asked for than there are tiles, up to 16 times, with new grain.

    ``digit_index`` points into ``load_digits(n_class=2)``, ``photo_index`` to a tile's upper left
    pixel in the flattened stack of the two photographs ``[2, 427, 640]``. ``independent`` counts
    tiles that do not overlap; for train it is the most that fit into the cells that were seen.

    Args:
        split: one of ``SPLITS``.
        correlation: how often the digit agrees with the label; None is 0.9, and 0.5 for ``*_ood``.
        samples: number of images (even); None is 3000 for train, 160 for val, 320 for test.
        generator: its seed decides every draw (see ``dominoes.stream``); None is seed 0.

    Raises:
        UsageError: a bad argument, more samples than that, or scikit-learn is missing.
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
        corners = _corners(role, stream(generator, "cells"))
        most = 2 * REPEATS[role] * min(map(len, corners))
        if samples > most:
            raise too_many_samples(samples, most)
        super().__init__(
            _digits(role, samples, stream(generator, "sources")),
            _tiles(corners, samples, stream(generator, f"patches/{role}")),
            split=split,
            correlation=correlation,
            class_names=PHOTOGRAPHS,
            samples=samples,
            generator=generator,
        )
        if role == "train":
            cells = {_cell_of(corner) for corner in self.photo_index.tolist()}
            self.independent["photographs"] = len(cells) * (CELL // TILE) ** 2


def equalize(tiles: Tensor, generator: torch.Generator) -> Tensor:
    """Standardise grey images ``[m, 32, 32]``, add grain and rank: uint8, all with one histogram."""
    contrast, mean = torch.std_mean(tiles, dim=(1, 2), keepdim=True)
    noise = torch.randn(tiles.shape, generator=generator, dtype=tiles.dtype)
    grey = ((tiles - mean) / contrast + GRAIN * noise).flatten(1)
    order = grey.argsort(dim=1, stable=True)
    levels = (torch.arange(grey.shape[1]) * 256 // grey.shape[1]).to(torch.uint8)
    ranked = torch.empty(grey.shape, dtype=torch.uint8).scatter_(1, order, levels.expand_as(order))
    return ranked.view(tiles.shape)


def _digits(role: str, samples: int, generator: torch.Generator) -> Pool:
    """Draw the part's digits, repeated to twice what is needed so that flips do not exhaust a pile.

    With m digits of each class a pile falls short of m / 2 with probability below exp(-m / 4).
    """
    small, classes = require("sklearn.datasets", extra="train").load_digits(
        n_class=2, return_X_y=True
    )
    classes = torch.from_numpy(classes).long()
    index = part_of(classes, SHARES[role], generator)
    index = index.repeat(math.ceil(2 * max(samples, 128) / len(index)))
    grey = (torch.from_numpy(small).view(-1, 8, 8) * (255 / 16)).round().to(torch.uint8)[index]
    large = grey.repeat_interleave(SIDE // 8, 1).repeat_interleave(SIDE // 8, 2)
    return Pool(large[:, None].expand(-1, 3, -1, -1), classes[index], index)


def _tiles(corners: list[Tensor], samples: int, generator: torch.Generator) -> Pool:
    """Cut tiles, as many of each photograph, enlarge and equalise them."""
    photographs = _photographs()
    _, height, width = photographs.shape
    drawn = []
    for indices in corners:
        rounds = math.ceil(samples / 2 / len(indices))
        shuffled = [
            indices[torch.randperm(len(indices), generator=generator)] for _ in range(rounds)
        ]
        drawn.append(torch.cat(shuffled)[: samples // 2])
    index = torch.cat(drawn)
    step = torch.arange(TILE)
    window = step[:, None] * width + step  # [16, 16] offsets from the upper left pixel
    grey = photographs.flatten()[index[:, None, None] + window]
    large = F.interpolate(grey[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    images = equalize(large[:, 0], generator)[:, None].expand(-1, 3, -1, -1)
    return Pool(images, index // (height * width), index)


def _corners(role: str, generator: torch.Generator) -> list[Tensor]:
    """For each photograph, find the upper left pixels of the squares that a part may show.

    Only cells with a textured tile are dealt out, so that each part gets its share of those.
    """
    photographs = _photographs()
    _, height, width = photographs.shape
    mean, square = (
        F.avg_pool2d(F.avg_pool2d(power, (TILE, 1), stride=1), (1, TILE), stride=1)
        for power in (photographs, photographs.square())
    )
    textured = square - mean.square() >= LEAST_CONTRAST**2
    top, left = torch.arange(textured.shape[1])[:, None], torch.arange(textured.shape[2])
    rows, columns = height // CELL, width // CELL  # what is left at the edges is not used
    inside = (
        (top % CELL <= CELL - TILE)
        & (left % CELL <= CELL - TILE)
        & (top < rows * CELL)
        & (left < columns * CELL)
    )
    aligned = inside & (top % TILE == 0) & (left % TILE == 0)
    shown = textured & (inside if role == "train" else aligned)
    corners = []
    for label in range(len(photographs)):
        tops, lefts = (textured[label] & aligned).nonzero().unbind(1)
        cells = torch.unique(tops // CELL * columns + lefts // CELL)
        cells = cells[torch.randperm(len(cells), generator=generator)]
        first, last = (round(edge * len(cells)) for edge in SHARES[role])
        tops, lefts = shown[label].nonzero().unbind(1)
        mine = torch.isin(tops // CELL * columns + lefts // CELL, cells[first:last])
        corners.append(((label * height + tops) * width + lefts)[mine])
    return corners


def _cell_of(corner: int) -> tuple[int, int, int]:
    """Return photograph, row and column of the cell in which a square's upper left pixel lies."""
    _, height, width = _photographs().shape
    photograph, pixel = divmod(corner, height * width)
    top, left = divmod(pixel, width)
    return photograph, top // CELL, left // CELL


@cache
def _photographs() -> Tensor:
    """Load both photographs in grey, float64 ``[2, 427, 640]``, values 0 to 255."""
    require("PIL", extra="train")  # decodes the photographs for scikit-learn
    load = require("sklearn.datasets", extra="train").load_sample_image
    pixels = torch.stack([torch.tensor(load(f"{name}.jpg")) for name in PHOTOGRAPHS])
    return (pixels.double() * torch.tensor(LUMA, dtype=torch.float64)).sum(-1)
