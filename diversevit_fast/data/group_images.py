"""Image folders with groups, decoded once and held in memory, in the form of the other data sets."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import require, usage_error
from .dominoes import stream
from .group_folder import GroupDataset
from .waterbirds import find_waterbirds, first_of_groups, folder_splits


class GroupImages(Dataset[tuple[Tensor, int, int]]):
    """A split whose images are tensors; an item is ``(image, label, group)``, the image float32 in [0, 1].

    Attributes:
        images: uint8 ``[n, 3, H, W]``.
        labels, attributes, groups: int64 ``[n]``; see ``GroupDataset``.
        image_size: ``(H, W)`` in pixels.
        num_classes: how many labels there are.
        class_names, group_names: one for each label and group.
    """

    def __init__(self, images: Tensor, split: GroupDataset):
        self.images, self.num_classes = images, split.num_classes
        self.labels, self.attributes, self.groups = split.labels, split.attributes, split.groups
        self.image_size = (images.shape[2], images.shape[3])
        self.group_names = split.group_names
        firsts = split.group_names[:: split.num_attributes]
        self.class_names = tuple(name.partition(", ")[0] for name in firsts)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index].float() / 255, int(self.labels[index]), int(self.groups[index])


def folder_images(
    root: str | os.PathLike[str],
    metadata: str | os.PathLike[str] | None = None,
    *,
    img_size: int | None = None,
    samples: Mapping[str, int | None] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, GroupImages]:
    """Decode an image folder into the five splits of ``folder_splits``, in memory.

    An image takes three bytes a pixel: Waterbirds at 224 x 224 about 2 GB. Images become RGB (an alpha channel is
    dropped) and are resized as group_DRO does it, bilinearly and without keeping the aspect ratio.

    Args:
        root: the folder, with file names relative to it.
        metadata: its CSV file, relative to ``root`` unless absolute; None looks for ``metadata.csv`` in the layouts
            that ``waterbirds`` knows.
        img_size: height and width to resize to, in pixels; None keeps them, if all are alike.
        samples: number of images by split, groups in their proportions; None or absent takes all.
        generator: its seed decides what is held out and which samples are taken; None is seed 0.

    Raises:
        UsageError: as ``folder_splits``; an image that cannot be decoded or has no 8 bits a channel; images of
            several sizes and no ``img_size``; more samples than images; or more than the memory holds.
    """
    check_img_size(img_size)
    if metadata is None:
        root, metadata = find_waterbirds(root), "metadata.csv"
    splits = folder_splits(root, metadata, generator=generator)
    chosen = {name: _sample(name, split, samples, generator) for name, split in splits.items()}
    size = chosen["train"].image(0).size[::-1] if img_size is None else (img_size, img_size)
    check_memory(sum(map(len, chosen.values())), size)
    return {
        name: GroupImages(_decode(split, size, resize=img_size is not None), split)
        for name, split in chosen.items()
    }


def check_img_size(img_size: int | None) -> None:
    """Check a number of pixels.

    Raises:
        UsageError: it is neither None nor a whole number from 1 to 4096.
    """
    whole = isinstance(img_size, int) and not isinstance(img_size, bool)
    if img_size is not None and not (whole and 2 <= img_size <= 4096):
        wanted = "a whole number of pixels from 2 to 4096"
        raise usage_error("img_size", wanted, repr(img_size), "try 224")


def check_memory(count: int, size: tuple[int, int]) -> None:
    """Check that ``count`` images of ``size`` (height, width) fit this machine's memory.

    Raises:
        UsageError: they do not.
    """
    height, width = size
    needed = 3 * count * height * width
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system
        return
    if needed > there:
        wanted = f"images that fit the memory of {there / 1e9:.0f} GB"
        got = f"{count} of {height} x {width} pixels, {needed / 1e9:.0f} GB"
        raise usage_error("img_size", wanted, got, "make them smaller, or pass samples")


def _sample(
    name: str,
    split: GroupDataset,
    samples: Mapping[str, int | None] | None,
    generator: torch.Generator | None,
) -> GroupDataset:
    """Return ``samples[name]`` images, with each group's share of them rounded to largest remainders."""
    size = (samples or {}).get(name)
    if size is None:
        return split
    if not 0 < size <= len(split):
        wanted = f"from 1 to {len(split)} for {name}"
        raise usage_error("samples", wanted, size, "ask for fewer, or leave it out")
    exact = split.counts * size / len(split)
    counts = exact.floor().long()
    remainders = (exact - counts).argsort(descending=True, stable=True)
    counts[remainders[: size - int(counts.sum())]] += 1
    order = torch.randperm(len(split), generator=stream(generator, f"samples/{name}"))
    return split.subset(first_of_groups(split, order, counts))


def _decode(split: GroupDataset, size: tuple[int, int], *, resize: bool) -> Tensor:
    """Decode all images of a split: uint8 ``[n, 3, H, W]`` of ``size`` (H, W)."""
    height, width = size
    bilinear = require("PIL.Image", extra="train").Resampling.BILINEAR
    images = torch.empty(len(split), 3, height, width, dtype=torch.uint8)
    for i in range(len(split)):
        image: Any = split.image(i)
        if image.size != (width, height):
            if not resize:
                got = f"{width} x {height} and {image.width} x {image.height}"
                hint = "say to which size they are to be brought (--img-size)"
                raise usage_error("img_size", "a number, as images differ in size", got, hint)
            image = image.resize((width, height), bilinear)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        images[i] = pixels.view(height, width, 3).permute(2, 0, 1)
    return images
