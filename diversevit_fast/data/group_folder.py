"""Image folders with a CSV file that names a label and an attribute of each image: Waterbirds and its relatives.

Two kinds of files are in use, and both are read:

=================================================  ===============================================================
columns                                            used by
=================================================  ===============================================================
``id,filename,split,y,a``                          SubpopBench, XRM: Waterbirds, CelebA, MetaShift, NICO++, ...
``img_id,img_filename,y,split,place,...``          group_DRO, WILDS and DFR: Waterbirds
=================================================  ===============================================================

A *group* is a label together with an attribute. Columns that are not needed are ignored.
"""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import require, usage_error
from ..files import FileError, read_bytes

_FILE_COLUMNS = ("filename", "img_filename")
_ATTRIBUTE_COLUMNS = ("a", "place")
_SPLITS = {"0": "train", "1": "val", "2": "test", "tr": "train", "va": "val", "te": "test"}
_SPLITS |= {name: name for name in ("train", "val", "test")} | {"valid": "val", "validation": "val"}
_LARGEST_CSV = 2**30  # bytes; CelebA's has 202,599 rows, 7 MB
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
"""Pillow's modes that it converts to RGB without cutting off values."""
_MOST_VALUES = 1000  # of a label or an attribute


class GroupDataset(Dataset[tuple[Any, int, int]]):
    """A data set of known groups; an item is ``(image, label, group)``.

    Attributes:
        labels, attributes, groups: int64 ``[n]``; ``groups`` is ``num_attributes * labels + attributes``.
        num_classes, num_attributes, num_groups: how many there are of each, in this and in other splits.
        group_names: one for each group, such as ``"y=1, place=0"``.
    """

    def __init__(
        self,
        labels: Tensor,
        attributes: Tensor,
        num_classes: int,
        num_attributes: int,
        names: tuple[str, str] = ("y", "a"),
    ):
        self.labels, self.attributes = labels, attributes
        self.num_classes, self.num_attributes = num_classes, num_attributes
        self.num_groups = num_classes * num_attributes
        self.groups = num_attributes * labels + attributes
        label, attribute = names
        self.group_names = tuple(
            f"{label}={y}, {attribute}={a}"
            for y in range(num_classes)
            for a in range(num_attributes)
        )

    @property
    def counts(self) -> Tensor:
        """The number of images in each group, int64 ``[num_groups]``."""
        return self.groups.bincount(minlength=self.num_groups)

    def image(self, index: int) -> Any:
        """The image of item ``index``, transformed."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        image = self.image(index)
        return image, int(self.labels[index]), int(self.groups[index])

    def subset(self, indices: Tensor) -> "GroupDataset":
        """The items at ``indices`` (int64), in their order, as a data set of the same groups."""
        return _Subset(self, indices)


class _Subset(GroupDataset):
    def __init__(self, whole: GroupDataset, indices: Tensor):
        super().__init__(
            whole.labels[indices],
            whole.attributes[indices],
            whole.num_classes,
            whole.num_attributes,
        )
        self.group_names, self._whole, self.indices = whole.group_names, whole, indices

    def image(self, index: int) -> Any:
        return self._whole.image(int(self.indices[index]))


class GroupFolder(GroupDataset):
    """Images that a CSV file lists; an item is ``(image, label, group)``, the image in RGB.

    >>> train = dvf.data.GroupFolder("waterbird_complete95_forest2water2", split="train", transform=...)
    >>> train.group_names[1], int(train.counts[1])
    ('y=0, place=1', 184)

    Args:
        root: the folder; file names in the CSV file are relative to it, or to ``image_root``.
        metadata: the CSV file, relative to ``root`` unless absolute.
        split: ``"train"``, ``"val"``, ``"test"`` (0, 1, 2 in the file), or None for all rows.
        transform: from a ``PIL.Image`` in RGB to what items hold; the image itself if None.
        label: the column of labels.
        attribute: the column of the (spurious) attribute; ``a`` or ``place``, whichever is there, if None.
        image_root: the folder of the images, if it is not ``root``.

    Attributes:
        filenames: of the items, as in the file. The others are those of ``GroupDataset``.

    Raises:
        UsageError: a missing or damaged CSV file, column or image file, an unknown split, a cell that is no whole
            number, fewer than two labels or attributes, or no image in the split. An item whose image cannot be
            decoded.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        metadata: str | os.PathLike[str] = "metadata.csv",
        *,
        split: str | None = None,
        transform: Callable[[Any], Any] | None = None,
        label: str = "y",
        attribute: str | None = None,
        image_root: str | os.PathLike[str] | None = None,
    ):
        path = Path(root) / metadata
        if split is not None and split not in ("train", "val", "test"):
            raise usage_error("split", "train, val, test or None", repr(split), "pick one of these")
        rows = _read(path)
        columns = _columns(rows[0], label, attribute, path)
        labels, attributes = (
            _numbers(rows, columns[what], path) for what in ("label", "attribute")
        )
        for name, values in ((columns["label"], labels), (columns["attribute"], attributes)):
            if len(values.unique()) < 2:
                got = f"{int(values[0])} in every row of {path}"
                raise usage_error(name, "at least two different values", got, "check the column")
        chosen = torch.arange(len(rows))
        if split is not None:
            splits = [_split_of(row, number, path) for number, row in enumerate(rows, 2)]
            chosen = torch.tensor([i for i, name in enumerate(splits) if name == split])
            if not len(chosen):
                there = ", ".join(dict.fromkeys(splits))
                raise usage_error("split", f"one of {there}, which {path} has", split, "check it")
        super().__init__(
            labels[chosen],
            attributes[chosen],
            int(labels.max()) + 1,
            int(attributes.max()) + 1,
            (columns["label"], columns["attribute"]),
        )
        self.filenames = [rows[i][columns["file"]] for i in chosen.tolist()]
        self._folder = Path(root if image_root is None else image_root)
        self._transform = transform
        missing = [name for name in self.filenames if not (self._folder / name).is_file()]
        if missing:
            got = f"{len(missing)} missing, the first {self._folder / missing[0]}"
            hint = "check root and image_root"
            raise usage_error("root", f"the {len(self)} images of {path}", got, hint)

    def image(self, index: int) -> Any:
        path = self._folder / self.filenames[index]
        image = open_image(path).convert("RGB")
        return image if self._transform is None else self._transform(image)


def open_image(path: str | os.PathLike[str]) -> Any:
    """Decode an image file into a ``PIL.Image`` of its own mode, with 8 bits a channel.

    Raises:
        UsageError: the file is missing or damaged, or a channel has another number of bits.
    """
    images = require("PIL.Image", extra="train")
    try:
        with open(path, "rb") as file:
            image = images.open(file)
            image.load()
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as failure:
        got = f"{path} ({' '.join(str(failure).split())})"
        raise usage_error("root", "images that can be decoded", got, "restore it") from None
    if image.mode not in _EIGHT_BITS:
        got = f"{path} of mode {image.mode}"
        raise usage_error("root", "images of 8 bits a channel", got, "convert it") from None
    return image.convert("RGBA") if "transparency" in image.info else image


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a line of column names, at least one."""
    try:
        text = read_bytes(path, _LARGEST_CSV).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except FileError as failure:
        raise usage_error(
            "metadata", "a CSV file", f"{path} ({failure.reason})", "check the path"
        ) from None
    except (UnicodeDecodeError, csv.Error) as failure:
        raise usage_error("metadata", "a CSV file", f"{path} ({failure})", "mend it") from None
    if not rows:
        raise usage_error("metadata", "a row for each image", f"none in {path}", "check the file")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            got = f"another number in row {number} of {path}"
            raise usage_error("metadata", "as many cells as columns", got, "mend the row")
    return rows


def _columns(
    row: Mapping[str, str], label: str, attribute: str | None, path: Path
) -> dict[str, str]:
    attributes = _ATTRIBUTE_COLUMNS if attribute is None else (attribute,)
    wanted: dict[str, Sequence[str]] = {"file": _FILE_COLUMNS, "label": (label,)}
    wanted |= {"attribute": attributes, "split": ("split",)}
    found = {}
    for what, names in wanted.items():
        there = [name for name in names if name in row]
        if not there:
            got = f"{', '.join(row)} in {path}"
            hint = "name the columns with label= and attribute=" if what != "file" else "mend it"
            raise usage_error("metadata", f"a column {' or '.join(names)}", got, hint)
        found[what] = there[0]
    return found


def _numbers(rows: Sequence[Mapping[str, str]], column: str, path: Path) -> Tensor:
    """A column of whole numbers from 0 on, int64 ``[n]``."""
    numbers = []
    for number, row in enumerate(rows, 2):
        cell = row[column].strip()
        if not (cell.isascii() and cell.isdigit() and int(cell) < _MOST_VALUES):
            got = f"{cell[:40]!r} in row {number} of {path}"
            wanted = f"a whole number below {_MOST_VALUES} in every row"
            raise usage_error(column, wanted, got, "number the values from 0 on")
        numbers.append(int(cell))
    return torch.tensor(numbers)


def _split_of(row: Mapping[str, str], number: int, path: Path) -> str:
    cell = row["split"].strip().lower()
    if cell not in _SPLITS:
        got = f"{cell[:40]!r} in row {number} of {path}"
        raise usage_error("split", "0, 1, 2, or train, val, test in every row", got, "mend the row")
    return _SPLITS[cell]


class _Wrapped(GroupDataset):
    """A subset of WILDS, whose items are ``(image, y, metadata)``."""

    def __init__(self, subset: Any, attribute: str):
        fields = list(subset.metadata_fields)
        for name in (attribute, "y"):
            if name not in fields:
                raise usage_error(
                    "attribute", f"one of {', '.join(fields)}", attribute, "see there"
                )
        labels = torch.as_tensor(subset.y_array).long().flatten()
        attributes = torch.as_tensor(subset.metadata_array)[:, fields.index(attribute)].long()
        whole = getattr(subset, "dataset", subset)
        everywhere = torch.as_tensor(whole.metadata_array)[:, fields.index(attribute)].long()
        classes = (
            getattr(subset, "n_classes", None) or int(torch.as_tensor(whole.y_array).max()) + 1
        )
        super().__init__(
            labels, attributes, int(classes), int(everywhere.max()) + 1, ("y", attribute)
        )
        self._subset = subset

    def image(self, index: int) -> Any:
        return self._subset[index][0]


def from_wilds(subset: Any, attribute: str = "background") -> GroupDataset:
    """A subset of WILDS (``dataset.get_subset("train", transform=...)``) as a data set of groups.

    Args:
        subset: has ``metadata_fields``, ``metadata_array``, ``y_array`` and items ``(image, y, metadata)``.
        attribute: one of its metadata fields.

    Raises:
        UsageError: it has no such field.
    """
    return _Wrapped(subset, attribute)
