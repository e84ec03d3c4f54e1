"""Dominoes: a digit above a photograph, and the pairing that correlates the two.

The photograph's class is the label; the digit is a simpler feature that agrees with the label
with probability ``correlation``. In one split (method: "Data: MNIST-CIFAR"):

1. digits of classes 0 and 1 are truncated to equal numbers (``part_of``);
2. each digit's label is its class, flipped with probability ``1 - correlation``: two piles;
3. photographs make two piles by class;
4. the four piles are shuffled, truncated to the smallest, and paired pile to pile (``pair``).

Randomness comes from named streams (``stream``), each seeded by the caller's generator's *seed* and
its own name alone, so a split is the same whether or not other splits were drawn before it.
"""

import hashlib
from collections.abc import Iterator
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UsageError, usage_error

SPLITS = ("train", "val_id", "val_ood", "test_id", "test_ood")
IMAGE_SIZE = (64, 32)  # a digit of 32 x 32 pixels above a photograph of as many
ID_CORRELATION, OOD_CORRELATION = 0.9, 0.5


class Pool(NamedTuple):
    """The digits, or the photographs, that one split may draw from."""

    images: Tensor  # uint8 [m, 3, h, w]
    classes: Tensor  # int64 [m], 0 or 1
    index: Tensor  # int64 [m], where each one stands in its source


class Pairs(NamedTuple):
    """Pairs of a digit and the photograph below it, as positions in the two pools."""

    digit: Tensor  # int64 [n]
    photo: Tensor  # int64 [n]


class Dominoes(Dataset[tuple[Tensor, int, int]]):
    """One split; an item is ``(image, label, group)``.

    The image is float32 ``[3, H, W]`` in [0, 1], the label the photograph's class, and the group
    ``2 * label + digit``. The whole split is held in tensors:

    Attributes:
        images: uint8 ``[n, 3, H, W]``, digit above photograph.
        labels, digits, groups: int64 ``[n]``; ``digits`` is the class of the digit that is drawn.
        digit_index, photo_index: int64 ``[n]``, where digit and photograph stand in their source.
        image_size: ``(H, W)`` in pixels.
        class_names, group_names: two labels, four groups.
        split, correlation: the split's name, and how often digit and label agree.
        independent: how many different things of each of the two ``kinds`` the images show, by the kind's name
            (``"digits"``, ``"photographs"``), which is what a standard error has to count: images that repeat
            one of them are not independent.
    """

    num_classes = 2
    kinds = ("digits", "photographs")
    digit_names = ("0", "1")

    def __init__(
        self,
        digits: Pool,
        photos: Pool,
        *,
        split: str,
        correlation: float,
        class_names: tuple[str, str],
        samples: int | None,
        generator: torch.Generator | None,
    ):
        self.split, self.correlation, self.class_names = split, correlation, class_names
        pairs = pair(digits.classes, photos.classes, correlation, stream(generator, split), samples)
        self.images = self._joined(digits.images[pairs.digit], photos.images[pairs.photo])
        self.labels = photos.classes[pairs.photo]
        self.digits = digits.classes[pairs.digit]
        self.groups = 2 * self.labels + self.digits
        self.digit_index = digits.index[pairs.digit]
        self.photo_index = photos.index[pairs.photo]
        shown = (self.digit_index, self.photo_index)
        counts = (len(index.unique()) for index in shown)
        self.independent = dict(zip(self.kinds, counts, strict=True))
        self.image_size = (self.images.shape[2], self.images.shape[3])
        self.group_names = tuple(
            f"{name} + {digit}" for name in class_names for digit in self.digit_names
        )

    def _joined(self, digits: Tensor, photos: Tensor) -> Tensor:
        """Make the split's images of those of its pairs."""
        return torch.cat([digits, photos], dim=2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index].float() / 255, int(self.labels[index]), int(self.groups[index])


def pair(
    digit_classes: Tensor,
    photo_classes: Tensor,
    correlation: float,
    generator: torch.Generator,
    samples: int | None = None,
) -> Pairs:
    """Pair digits and photographs (steps 2 to 4 above) and shuffle, so that any prefix is a fair sample.

    Args:
        digit_classes: int64 ``[m]``, as many zeros as ones.
        photo_classes: int64 ``[p]``.
        samples: truncate the piles further, to this many pairs in all (even).

    Raises:
        UsageError: a pile is empty, or too small for ``samples``.
    """
    flipped = torch.rand(len(digit_classes), generator=generator, dtype=torch.float64)
    digit_labels = digit_classes ^ (flipped >= correlation).long()
    piles = [
        _shuffled((classes == label).nonzero().flatten(), generator)
        for classes in (digit_labels, photo_classes)
        for label in (0, 1)
    ]
    smallest = min(len(pile) for pile in piles)
    if smallest == 0:
        raise usage_error(
            "source",
            "digits and photographs for both labels",
            f"piles of {[len(pile) for pile in piles]}",
            "use a larger source or another seed",
        )
    size = smallest if samples is None else samples // 2
    if size > smallest:
        raise too_many_samples(samples, 2 * smallest)
    order = torch.randperm(2 * size, generator=generator)
    digit0, digit1, photo0, photo1 = (pile[:size] for pile in piles)
    return Pairs(torch.cat([digit0, digit1])[order], torch.cat([photo0, photo1])[order])


def part_of(classes: Tensor, share: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Choose one part of a shuffled source: indices ``[m]``, as many of class 0 as then of class 1.

    ``share`` is an interval of [0, 1]; with equal generators, disjoint intervals give disjoint
    parts.
    """
    members = [_shuffled((classes == label).nonzero().flatten(), generator) for label in (0, 1)]
    smallest = min(len(indices) for indices in members)
    start, stop = (round(edge * smallest) for edge in share)
    return torch.cat([indices[start:stop] for indices in members])


def stream(generator: torch.Generator | None, name: str) -> torch.Generator:
    """Make a generator seeded by the first four bytes of SHA-256 of ``"<seed>/<name>"``.

    The seed is ``generator.initial_seed()`` (0 for None); its state is neither read nor advanced.
    The names in use are the splits, for flips and pairing; ``sources``, for cutting the sources
    in parts; ``label noise``; and ``cells``, ``patches/train``, ``patches/val``, ``patches/test`` for
    ``DigitsPhotos``.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        got = type(generator).__name__
        raise usage_error(
            "generator", "a torch.Generator or None", got, "torch.Generator() makes one"
        )
    seed = 0 if generator is None else generator.initial_seed()
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def role_of(split: str) -> str:
    """The part of the sources that a split is made of: ``train``, ``val`` or ``test``.

    Raises:
        UsageError: no such split.
    """
    if split not in SPLITS:
        raise usage_error("split", f"one of {', '.join(SPLITS)}", repr(split), "pick one of these")
    return split.partition("_")[0]


def correlation_of(split: str, correlation: float | None) -> float:
    """Return ``correlation``, or the split's default: 0.9 in distribution, 0.5 out of it.

    Raises:
        UsageError: not a number in [0, 1].
    """
    if correlation is None:
        return OOD_CORRELATION if split.endswith("_ood") else ID_CORRELATION
    if not (isinstance(correlation, Real) and 0 <= correlation <= 1):
        raise usage_error(
            "correlation", "a number in [0, 1]", repr(correlation), "0.5 is no correlation"
        )
    return float(correlation)


def check_samples(samples: int | None) -> None:
    """Check that ``samples`` is even, since labels are balanced.

    Raises:
        UsageError: not a positive even integer.
    """
    if samples is not None and not (isinstance(samples, int) and samples > 0 and samples % 2 == 0):
        raise usage_error(
            "samples", "a positive even number", repr(samples), "both labels get half of it"
        )


def too_many_samples(samples: int | None, most: int) -> UsageError:
    """Build the error for more images than the sources have."""
    return usage_error(
        "samples", f"at most {most}", samples, "ask for fewer or use a larger source"
    )


def batches(
    dataset: Dominoes, batch_size: int, *, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Iterate over a split in batches: the values of a ``DataLoader``, without one.

    Shuffles if and only if a (CPU) generator is given, and advances it, so that each epoch has its
    own order. The last, smaller batch is kept.

    Returns:
        An iterator of images float32 ``[b, 3, H, W]`` in [0, 1], labels and groups int64 ``[b]``.

    Raises:
        UsageError: ``batch_size`` is not a positive integer.
    """
    if not (isinstance(batch_size, int) and batch_size > 0):
        raise usage_error("batch_size", "a positive integer", repr(batch_size), "pass 1 or more")
    count = len(dataset)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    return (
        (_floats(dataset.images[rows]), dataset.labels[rows], dataset.groups[rows])
        for rows in order.split(batch_size)
    )


def _floats(images: Tensor) -> Tensor:
    """Return bytes as float32 in [0, 1], and what holds fractions already as float32."""
    return images.float() if images.is_floating_point() else images.float() / 255


def _shuffled(indices: Tensor, generator: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)]
