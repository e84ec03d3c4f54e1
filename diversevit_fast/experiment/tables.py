"""Tables on the terminal, and the same as JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import require


def new_table(*columns: str) -> Any:
    """Make an empty table, the first column to the left and the others to the right."""
    table = require("rich.table", extra="train").Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def print_table(title: str, table: Any, note: str) -> None:
    """Print a table between a title and a note."""
    console = require("rich.console", extra="train").Console()
    console.print(title, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(table)
    console.print(note, highlight=False, soft_wrap=True)


def print_json(content: Mapping[str, Any]) -> None:
    """Print JSON that every reader takes: what is no finite number becomes null."""
    print(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(name): _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
