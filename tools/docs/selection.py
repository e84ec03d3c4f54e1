"""Write the tables of docs/science/selection.md from docs/science/results/selection.json.

``python -m tools.docs.selection "NAME=FOLDER" ...`` first keeps what the page needs of the folders that
``diversevit selection-study`` wrote, in this order, in place of what was kept before. With ``--add`` before the first
name it adds them to that, each at the end, or in the place of the study of its name.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diversevit_fast.experiment.config import read_json
from diversevit_fast.experiment.run_files import write_text
from diversevit_fast.experiment.selection_report import TITLES, across, table
from tools.docs.support import between

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs/science/results/selection.json"
PAGE = ROOT / "docs/science/selection.md"
FULL = {"mnist-cifar": "MNIST-CIFAR", "digits-photos": "DigitsPhotos"}
"""The studies that are printed whole: marker and name."""


def parts(studies: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the page, by marker."""
    found = {
        f"{marker}-{pool}": table(studies[name]["pools"][pool])
        for marker, name in FULL.items()
        for pool in TITLES
    }
    return found | {f"conditions-{pool}": across(studies, pool) for pool in TITLES}


def page(text: str, studies: Mapping[str, Any]) -> str:
    """The page with its tables made anew."""
    for marker, part in parts(studies).items():
        text = between(text, marker, part)
    return text


def keep(folders: Mapping[str, str], before: Mapping[str, Any] | None = None) -> str:
    """The record of several studies, a line each: those kept ``before``, and those in ``folders``."""
    found = {
        name: read_json(Path(folder) / "selection.json", name) for name, folder in folders.items()
    }
    lines = [
        f"{json.dumps(name)}: {json.dumps(study, separators=(',', ':'))}"
        for name, study in {**(before or {}), **found}.items()
    ]
    return "{" + ",\n".join(lines) + "}\n"


def main(arguments: Sequence[str]) -> None:
    """Keep the studies that are named, if any, and write the page."""
    named = [argument for argument in arguments if argument != "--add"]
    if named:
        before = read_json(RECORD, "results") if "--add" in arguments else None
        write_text(RECORD, keep(dict(argument.split("=", 1) for argument in named), before))
    studies = read_json(RECORD, "results")
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), studies))


if __name__ == "__main__":
    main(sys.argv[1:])
