"""Write the tables of a page about a timm model from random weights, from a finished run.

``python -m tools.docs.from_scratch RUN --commit HASH [--cpu-seconds N]`` keeps what the page of the run's model
(``PAGES``) needs of the folder RUN in docs/science/results. Then, and without RUN, it writes the tables between the
pages' markers.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diversevit_fast.experiment.config import Settings
from diversevit_fast.experiment.models import described
from tools.docs.default_run import recipe, result_of, run_tables
from tools.docs.kept_run import keep_run, write_tables

SCIENCE = Path(__file__).parents[2] / "docs/science"
PAGES = {
    "timm:vit_tiny_patch16_224": SCIENCE / "vit_tiny.md",
    "timm:eva02_tiny_patch14_224": SCIENCE / "eva02_tiny.md",
}


def result_file(page: Path) -> Path:
    """Where what a page needs of its run is kept."""
    return SCIENCE / "results" / f"{page.stem}.json"


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return a page's tables by the names of their markers."""
    counts = ", ".join(f"{name} {x['samples']:,}" for name, x in result["splits"].items())
    seconds = result["cpu_seconds"]
    facts = [
        f"* commit {result['commit']}, torch {result['versions']['torch']}, {result['processor']}",
        f"* {described(Settings.from_json(result['settings']))}",
        recipe(result),
        f"* images: {counts}",
        "* processor time was not recorded"
        if seconds is None
        else f"* {seconds} s of processor time in all processes",
    ]
    return {"facts": "\n".join(facts), **run_tables(result)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep a run, if one is given, and write the pages."""
    keep_run(
        *("from_scratch", __doc__, result_of),
        lambda result: result_file(PAGES[result["settings"]["architecture"]]),
        arguments,
        timed=False,
    )
    for page in PAGES.values():
        write_tables(page, tables(json.loads(result_file(page).read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
