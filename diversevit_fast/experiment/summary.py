"""Print the comparison of a run, or of several joined, on the terminal."""

from pathlib import Path
from typing import Any

from ..errors import require
from .metrics import compare, present
from .models import described
from .progress import NAMES
from .report import ONE_METHOD, TITLES, verdict_sentence, verdicts_of
from .several import Trainings, read_finished


def show_comparison(folder: Path, console: Any) -> None:
    """Print the table, the verdicts and the path of the report of a finished run."""
    show_trainings(read_finished(folder), folder / "report.html", console)


def show_trainings(trainings: Trainings, page: Path, console: Any) -> None:
    """Print what is not finished, the table, the verdicts and the path of the page."""
    rows = trainings.rows
    for line in trainings.missing:
        console.print(f"not finished: {line}", highlight=False, markup=False, emoji=False)
    table = require("rich.table", extra="train").Table(box=None, padding=(0, 1, 0, 0))
    for column in ("heads", "chosen on", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("ID test", "OOD test", "worst group"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in compare(rows):
        chosen_on = line.rule.chosen_on + (", oracle" if line.rule.oracle else "")
        numbers = (line.test_id, line.test_ood, line.worst_group)
        table.add_row(line.rule.heads, chosen_on, NAMES[line.method], *map(str, numbers))
    console.print(table)
    console.print(f"Model: {described(trainings.settings)}", highlight=False, markup=False)
    for verdict in verdicts_of(trainings):
        said = f"{TITLES[verdict.claim]}: {verdict.said}. {verdict_sentence(verdict)}"
        console.print(said, highlight=False)
    if len(present(rows)[0]) == 1:
        console.print(ONE_METHOD, highlight=False)
    console.print(str(page), highlight=False, soft_wrap=True, markup=False, emoji=False)
