"""Small image folders with a CSV file of labels and attributes, made up."""

import csv
import random
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

PER_GROUP = {"train": (30, 10, 10, 30), "val": (8, 8, 8, 8), "test": (16, 16, 16, 16)}


def pixels_of(label: int, attribute: int, number: int) -> tuple[int, int, int]:
    """The colour of an image: red says the label, green the attribute, blue the number."""
    return 60 + 120 * label, 40 + 160 * attribute, number % 256


def make_group_folder(
    folder: Path,
    *,
    size: tuple[int, int] = (16, 16),
    per_group: Mapping[str, tuple[int, int, int, int]] = PER_GROUP,
) -> Path:
    """Write plainly coloured images of ``size`` (width, height) and ``metadata.csv`` of five columns."""
    folder.mkdir(parents=True)
    rows = [
        (split, *divmod(group, 2))
        for split, counts in per_group.items()
        for group, count in enumerate(counts)
        for _ in range(count)
    ]
    random.Random(0).shuffle(rows)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "filename", "split", "y", "a"])
        for number, (split, label, attribute) in enumerate(rows):
            name = f"{number:04}.png"
            Image.new("RGB", size, pixels_of(label, attribute, number)).save(folder / name)
            writer.writerow([number, name, split, label, attribute])
    return folder
