"""Waterbirds (Sagawa et al., arXiv 1911.08731) and image folders like it, in five splits."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import usage_error
from .dominoes import stream
from .group_folder import GroupDataset, GroupFolder

FOLDERS = (
    "",
    "waterbirds_v1.0",
    "waterbird_complete95_forest2water2",
    "waterbirds/waterbird_complete95_forest2water2",
    "cub/data/waterbird_complete95_forest2water2",
)
"""Below a root: WILDS', and those of group_DRO, SubpopBench and DFR."""


def waterbirds(
    root: str | os.PathLike[str],
    *,
    transform: Callable[[Any], Any] | None = None,
    train_transform: Callable[[Any], Any] | None = None,
    held_out: float = 0.1,
    generator: torch.Generator | None = None,
) -> dict[str, GroupDataset]:
    """Return the five splits of a downloaded Waterbirds, by the names of ``dvf.data.SPLITS``.

    The published validation and test sets are balanced between land and water within each class, so with respect
    to training, where they agree with the class in 95 % of images, they are out of distribution. There is no
    validation set like the training data: ``val_id`` is cut from it.

    ============  ================================================================================================
    ``train``     the published training set without ``val_id``
    ``val_id``    a fraction ``held_out`` of the published training set, of every group alike
    ``val_ood``   the published validation set
    ``test_ood``  the published test set
    ``test_id``   the largest part of the test set whose groups have the training set's proportions
    ============  ================================================================================================

    Args:
        root: the folder with ``metadata.csv``, or one above it, as WILDS, group_DRO and DFR lay them out.
        transform: of images of all splits; see ``GroupFolder``.
        train_transform: of the images of ``train`` instead.
        held_out: above 0 and below 1.
        generator: its seed decides what is held out and what ``test_id`` holds (see ``dominoes.stream``); None is
            seed 0.

    Raises:
        UsageError: no such data set below ``root``, or a damaged one.
    """
    return folder_splits(
        find_waterbirds(root),
        transform=transform,
        train_transform=train_transform,
        held_out=held_out,
        generator=generator,
    )


def folder_splits(
    root: str | os.PathLike[str],
    metadata: str | os.PathLike[str] = "metadata.csv",
    *,
    transform: Callable[[Any], Any] | None = None,
    train_transform: Callable[[Any], Any] | None = None,
    held_out: float = 0.1,
    generator: torch.Generator | None = None,
) -> dict[str, GroupDataset]:
    """Return the five splits of any folder that ``GroupFolder`` reads, cut as ``waterbirds`` cuts them.

    The file's validation and test sets become ``val_ood`` and ``test_ood``: they should hold groups in other
    proportions than the training set.

    Args:
        root, metadata: see ``GroupFolder``.
        transform, train_transform, held_out, generator: see ``waterbirds``.

    Raises:
        UsageError: as ``GroupFolder``; a label without training images; a group of the training set without test
            images; or so few images that ``val_id`` or ``test_id`` is empty.
    """
    if not (isinstance(held_out, float) and 0 < held_out < 1):
        raise usage_error("held_out", "a fraction between 0 and 1", repr(held_out), "try 0.1")
    usual = {
        name: GroupFolder(root, metadata, split=name, transform=transform)
        for name in ("train", "val", "test")
    }
    train = usual["train"]
    test = usual["test"]
    _check_groups(train, test)
    augmented = train
    if train_transform is not None:
        augmented = GroupFolder(root, metadata, split="train", transform=train_transform)
    order = torch.randperm(len(train), generator=stream(generator, "train"))
    held = first_of_groups(train, order, (held_out * train.counts).round().long())
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[held] = False
    scale = (test.counts / train.counts).nan_to_num(torch.inf, posinf=torch.inf).min()
    shares = (scale * train.counts + 1e-9).long()
    order = torch.randperm(len(test), generator=stream(generator, "test_id"))
    splits = {
        "train": augmented.subset(kept.nonzero().flatten()),
        "val_id": train.subset(held),
        "val_ood": usual["val"],
        "test_id": test.subset(first_of_groups(test, order, shares)),
        "test_ood": test,
    }
    for name, split in splits.items():
        if not len(split):
            got = f"{len(train)} training and {len(test)} test images"
            raise usage_error("root", f"enough images for {name}", got, "use a larger data set")
    return splits


def find_waterbirds(root: str | os.PathLike[str]) -> Path:
    """Return the folder of ``metadata.csv``, at or below ``root``, in one of the published layouts.

    Raises:
        UsageError: there is none.
    """
    return _folder(Path(root))


def _check_groups(train: GroupDataset, test: GroupDataset) -> None:
    """Raise if a label cannot be learned, or if no part of the test set can look like the training set."""
    per_label = train.labels.bincount(minlength=train.num_classes)
    if not per_label.all():
        got = f"none with label {int((per_label == 0).nonzero()[0])}"
        hint = "number the labels from 0 on without gaps, or add images"
        raise usage_error("train", "images of every label", got, hint)
    for name, ours, theirs in zip(train.group_names, train.counts, test.counts, strict=True):
        if ours and not theirs:
            wanted = "images of every group that the training set has"
            raise usage_error("test", wanted, f"none of {name}", "add some")


def _folder(root: Path) -> Path:
    for name in FOLDERS:
        if (root / name / "metadata.csv").is_file():
            return root / name
    below = ", ".join(name or "." for name in FOLDERS)
    hint = "see https://github.com/kohpangwei/group_DRO#waterbirds for the data"
    raise usage_error("root", f"metadata.csv in one of {below}", root, hint)


def first_of_groups(dataset: GroupDataset, order: Tensor, counts: Tensor) -> Tensor:
    """Return the first ``counts[g]`` of each group g in ``order``, as sorted indices."""
    parts = [order[dataset.groups[order] == g][:n] for g, n in enumerate(counts.tolist())]
    return torch.cat(parts).sort().values
