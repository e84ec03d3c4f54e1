"""Print the comparison of a finished run on the terminal."""

from pathlib import Path
from typing import Any

from ..errors import require
from .config import read_json
from .metrics import compare, judge, present, read_csv
from .progress import NAMES
from .report import claim_sentence


def show_comparison(folder: Path, console: Any) -> None:
    """Print the table, the verdict and the path of the report."""
    rows = read_csv(folder / "metrics.csv")
    splits = read_json(folder / "config.json", "config.json")["splits"]
    lines = compare(rows)
    table = require("rich.table", extra="train").Table(box=None, padding=(0, 1, 0, 0))
    for column in ("heads", "chosen on", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("ID test", "OOD test", "worst group"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        chosen_on = line.rule.chosen_on + (", oracle" if line.rule.oracle else "")
        numbers = (line.test_id, line.test_ood, line.worst_group)
        table.add_row(line.rule.heads, chosen_on, NAMES[line.method], *map(str, numbers))
    console.print(table)
    claim = judge(lines, splits["test_ood"]["samples"])
    console.print(claim_sentence(claim, len(present(rows)[1])), highlight=False)
    page = str(folder / "report.html")
    console.print(page, highlight=False, soft_wrap=True, markup=False, emoji=False)
