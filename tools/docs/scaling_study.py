"""Write the tables of the study of sizes into docs/scaling.md from its recorded predictions.

``python examples/scaling_study.py --json benchmarks/results/scaling_study.json`` records them;
``python -m tools.docs.scaling_study`` writes the tables between the page's markers.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from tools.docs.kept_run import write_tables

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/scaling.md"
RESULT = ROOT / "benchmarks/results/scaling_study.json"


def study() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(
        "scaling_study", ROOT / "examples/scaling_study.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables() -> dict[str, str]:
    """The page's tables by the names of their markers."""
    rows = json.loads(RESULT.read_text("utf-8"))["rows"]
    return {f"study-{name}": table for name, table in study().tables(rows).items()}


if __name__ == "__main__":
    write_tables(PAGE, tables())
    sys.exit(0)
