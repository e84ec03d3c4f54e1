"""Rows of ``metrics.csv``, and selection and means computed from them.

A row is one method, seed, epoch, split and choice of heads (``"all"`` or one head's number). The
split ``train`` holds the running means of training, the others an evaluation after the epoch.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, usage_error
from ..files import path_exists, read_bytes
from .run_files import write_text

Row = dict[str, Any]

SPLIT_NAMES = {
    "val_id": "ID validation",
    "val_ood": "OOD validation",
    "test_id": "ID test",
    "test_ood": "OOD test",
}
EVALUATED = tuple(SPLIT_NAMES)
COLUMNS: dict[str, type] = {
    "method": str,
    "seed": int,
    "epoch": int,
    "split": str,
    "heads": str,
    "accuracy": float,
    "worst_group": float,
    "loss": float,
    "penalty": float,
    "seconds": float,
    "steps_per_second": float,
}
_OPTIONAL = ("penalty", "steps_per_second")
TIMING = ("seconds", "steps_per_second")


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write the rows; a value that does not exist is an empty cell, floats keep nine digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = (row.get(name) for name in COLUMNS)
        writer.writerow(
            "" if c is None else f"{c:.9g}" if isinstance(c, float) else c for c in cells
        )
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """Read the rows of a file that ``write_csv`` wrote.

    Raises:
        UsageError: no such file, one that cannot be read, other columns, an unfit cell, or rows missing.
    """
    if not path_exists(path):
        raise _damaged("a readable file", f"no {path}")
    try:
        text = read_bytes(path).decode("utf-8")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if reader.fieldnames != list(COLUMNS):
            raise _damaged("the columns of a run", f"{reader.fieldnames} in {path}")
        rows = [_parse(row, f"{path}, line {reader.line_num}") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _damaged("a readable file", f"{path} ({error})") from None
    cells: dict[tuple, set[tuple]] = {}
    for r in rows:
        cells.setdefault((r["method"], r["seed"], r["epoch"]), set()).add((r["split"], r["heads"]))
    if not rows or any(found != next(iter(cells.values())) for found in cells.values()):
        raise _damaged("rows for every epoch alike" if rows else "rows", f"{len(rows)} in {path}")
    return rows


def _parse(cells: dict[str, str | None], where: str) -> Row:
    try:
        row = {k: _value(kind, cells[k], k in _OPTIONAL) for k, kind in COLUMNS.items()}
    except (TypeError, ValueError):
        raise _damaged("a value in every column", where) from None
    return row


def _value(kind: type, cell: str | None, optional: bool) -> Any:
    if cell is None:
        raise ValueError("the line is cut off")
    return None if optional and not cell else kind(cell)


def _damaged(wanted: str, got: str) -> UsageError:
    return usage_error(
        "metrics.csv", wanted, got, "give the folder of a finished run, or repeat it"
    )


@dataclass(frozen=True)
class Rule:
    """Selection rule for epoch and heads: the highest accuracy on ``split``, the earliest at a tie."""

    split: str
    single: bool  # one head of the last layer, rather than all

    @property
    def heads(self) -> str:
        return "best head" if self.single else "all heads"

    @property
    def chosen_on(self) -> str:
        return SPLIT_NAMES[self.split]

    @property
    def oracle(self) -> bool:
        """True if the test set itself is used to choose."""
        return self.split.startswith("test")

    def __str__(self) -> str:
        what = "head and epoch" if self.single else "epoch"
        return f"{self.heads}, {what} chosen on {self.chosen_on}"

    def pick(self, rows: Sequence[Row]) -> Row:
        """Return the chosen row among the rows of one method and seed."""
        candidates = [
            r for r in rows if r["split"] == self.split and (r["heads"] != "all") == self.single
        ]
        return max(candidates, key=lambda r: (r["accuracy"], -r["epoch"]))


SELECTED = Rule("val_ood", single=True)
RULES = (
    Rule("val_id", single=False),
    Rule("val_ood", single=False),
    SELECTED,
    Rule("test_ood", single=True),
)


@dataclass(frozen=True)
class Summary:
    """Mean and population standard deviation over seeds."""

    mean: float
    sd: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        return cls(statistics.fmean(values), statistics.pstdev(values), len(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.sd:.3f}" if self.count > 1 else f"{self.mean:.3f}"


@dataclass(frozen=True)
class Line:
    """One line of the comparison: one method under one selection rule."""

    rule: Rule
    method: str
    test_id: Summary
    test_ood: Summary
    worst_group: Summary
    chosen: list[tuple[int, int, str]]  # (seed, epoch, heads)


def of_run(rows: Sequence[Row], method: str, seed: int) -> list[Row]:
    """Return the rows of one method and seed."""
    return [r for r in rows if r["method"] == method and r["seed"] == seed]


def present(rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    """Return the methods and seeds that occur, in order of appearance."""
    return list(dict.fromkeys(r["method"] for r in rows)), list(
        dict.fromkeys(r["seed"] for r in rows)
    )


def find(rows: Sequence[Row], epoch: int, split: str, heads: str) -> Row:
    """Return the row of one run at ``epoch``, ``split`` and ``heads``."""
    return next(r for r in rows if (r["epoch"], r["split"], r["heads"]) == (epoch, split, heads))


def compare(rows: Sequence[Row]) -> list[Line]:
    """Compare every method under every rule: accuracy on both test splits, worst group of the OOD one."""
    methods, seeds = present(rows)
    lines = []
    for rule in RULES:
        for method in methods:
            runs = {seed: of_run(rows, method, seed) for seed in seeds}
            picks = {seed: rule.pick(run) for seed, run in runs.items() if run}
            tests = [
                [find(runs[s], p["epoch"], split, p["heads"]) for s, p in picks.items()]
                for split in ("test_id", "test_ood")
            ]
            lines.append(
                Line(
                    rule,
                    method,
                    Summary.of([r["accuracy"] for r in tests[0]]),
                    Summary.of([r["accuracy"] for r in tests[1]]),
                    Summary.of([r["worst_group"] for r in tests[1]]),
                    [(s, p["epoch"], p["heads"]) for s, p in picks.items()],
                )
            )
    return lines
