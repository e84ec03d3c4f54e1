"""Write the tables of docs/science/vit_tiny.md from a finished run of a timm model from random weights.

``python -m tools.docs.vit_tiny RUN --commit HASH --cpu-seconds N`` keeps what the page needs of the folder RUN in
docs/science/results/vit_tiny.json. Then, and without RUN, it writes the tables between the page's markers.
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

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/science/vit_tiny.md"
RESULT = ROOT / "docs/science/results/vit_tiny.json"


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the page's tables by the names of their markers."""
    counts = ", ".join(f"{name} {x['samples']:,}" for name, x in result["splits"].items())
    facts = [
        f"* commit {result['commit']}, torch {result['versions']['torch']}, {result['processor']}",
        f"* {described(Settings.from_json(result['settings']))}",
        recipe(result),
        f"* images: {counts}",
        f"* {result['cpu_seconds']} s of processor time in all processes",
    ]
    return {"facts": "\n".join(facts), **run_tables(result)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep a run, if one is given, and write the page."""
    keep_run("vit_tiny", __doc__, result_of, RESULT, arguments)
    write_tables(PAGE, tables(json.loads(RESULT.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
