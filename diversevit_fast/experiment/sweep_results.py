"""``results.csv`` of a sweep: a row per finished cell and selection rule.

All settings are columns (arguments of the model as ``model.depth``), beside them seed, role and what came out.
"""

import contextlib
import csv
import importlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, usage_error
from ..files import read_bytes, writing
from .config import MODEL_KEYS, Settings, read_json
from .metrics import EVALUATED, RULES, Row, Rule, find, read_csv
from .run_files import write_text
from .run_record import settings_of
from .sweep_costs import COSTS, costs_of
from .sweep_folder import SweepFolder
from .sweep_grid import Cell, as_text
from .verdict import mean_of_pairs

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

_LEFT_OUT = (
    *("methods", "seeds", "erm_lr", "download", "tensorboard", "workers", "fsdp", "model"),
    "keep_checkpoints",
)
_SETTINGS = tuple(name for name in Settings.__dataclass_fields__ if name not in _LEFT_OUT)
_MODEL = tuple(f"model.{name}" for name in MODEL_KEYS)
FOUND = ("commit", "torch", "device", "seconds", "epoch", "heads")
MEASURED = (*EVALUATED, "worst_group", "penalty", "cosine", "dead_heads")
COLUMNS = ("cell", "rule", "role", "seed", *_SETTINGS, *_MODEL, *FOUND, *MEASURED, *COSTS)
_DEAD = 0.05
_WORDS = ("commit", "cell", "torch", "rule", "heads", "source", "pretrained")  # never numbers


class Results:
    """The results of a sweep; cells that were read once are not read again."""

    def __init__(self, sweep: SweepFolder):
        self._sweep = sweep
        self._read: dict[str, list[Row]] = {}

    def rows(self, done: Sequence[str]) -> list[Row]:
        """Return the rows of the finished cells ``done``.

        Raises:
            UsageError: a file of one is missing or damaged, or belongs to other settings.
        """
        for name in done:
            if name not in self._read:
                self._read[name] = rows_of(self._sweep, self._sweep.cells[name])
        return [row for name in done for row in self._read[name]]

    def update(self) -> list[Row]:
        """Write ``results.csv`` of what is finished now; return its rows.

        Raises:
            FileError: it cannot be written; the one that was there is unchanged.
        """
        with _alone(self._sweep.path / "claims" / ".results.lock"):
            rows = self.rows(self._sweep.progress().done)
            write_results(rows, self._sweep.path / "results.csv")
        return rows


def rows_of(sweep: SweepFolder, cell: Cell) -> list[Row]:
    """Return the rows of a finished cell, one per selection rule."""
    folder = sweep.place(cell).out
    record = read_json(folder / "config.json", "config.json")
    rows = read_csv(folder / "metrics.csv")
    cosines = read_json(folder / "cosines.json", "cosines.json")
    if settings_of(record) != cell.settings:
        hint = f"move {folder} away, then resume"
        raise usage_error("sweep", "the settings of this cell", f"others in {folder}", hint)
    try:
        groups = record["splits"]["val_id"]["groups"]
        after = next(iter(cosines.values()))["after"]
        gpu = record["machine"].get("gpu") if _on_gpu(record) else None
        given: Row = {"cell": cell.name, "role": cell.role, "seed": cell.seed}
        given |= {name: getattr(cell.settings, name) for name in _SETTINGS}
        given |= {f"model.{name}": value for name, value in cell.settings.model.items()}
        given |= {
            "commit": record.get("commit"),
            "torch": record["versions"].get("torch"),
            "device": gpu if _on_gpu(record) else "cpu",
            "seconds": sum(row["seconds"] for row in _timed(rows)),
            "cosine": mean_of_pairs(after),
        }
    except (KeyError, TypeError, StopIteration, AttributeError) as failure:
        got = f"incomplete ones ({type(failure).__name__}: {failure})"
        hint = f"move {folder} away, then resume"
        raise usage_error("sweep", f"the files of a run in {folder}", got, hint) from None
    weights = folder / f"{next(iter(cosines))}.safetensors"
    given |= costs_of(cell.settings, gpu, weights, sweep.path / "costs")
    return [{**given, **_chosen(rule, rows, groups)} for rule in RULES]


def _chosen(rule: Rule, rows: Sequence[Row], groups: dict[str, int]) -> Row:
    chosen = rule.pick(rows)
    epoch, heads = chosen["epoch"], chosen["heads"]
    at = {split: find(rows, epoch, split, heads) for split in EVALUATED}
    return {
        "rule": rule_name(rule),
        "epoch": epoch,
        "heads": heads,
        **{split: row["accuracy"] for split, row in at.items()},
        "worst_group": at["test_ood"]["worst_group"],
        "penalty": find(rows, epoch, "val_id", "all")["penalty"],
        "dead_heads": dead_heads(rows, epoch, groups),
    }


def rule_name(rule: Rule) -> str:
    """Return the name of a selection rule in ``results.csv``, such as ``best_head:val_ood``."""
    return f"{'best_head' if rule.single else 'all_heads'}:{rule.split}"


def dead_heads(rows: Sequence[Row], epoch: int, groups: dict[str, int]) -> int:
    """Return how many heads alone predict about one class only, on ID validation.

    Such a head's accuracy exceeds the share of the largest class by 0.05 at most, and its worst group's is 0.1 at most.

    Args:
        groups: samples by name of a group, which begins with its class.
    """
    classes: dict[str, int] = {}
    for name, count in groups.items():
        label = re.split(r" \+ |, ", name)[0]
        classes[label] = classes.get(label, 0) + count
    share = max(classes.values()) / sum(classes.values())
    alone = [
        r for r in rows if r["epoch"] == epoch and r["split"] == "val_id" and r["heads"] != "all"
    ]
    return sum(r["accuracy"] <= share + _DEAD and r["worst_group"] <= 2 * _DEAD for r in alone)


def write_results(rows: Sequence[Row], path: Path) -> None:
    """Write rows with ``COLUMNS``; what is None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow(_cell(row.get(name)) for name in COLUMNS)
    write_text(path, text.getvalue())


def load_results(path: str | os.PathLike[str]) -> Any:
    """Load the results of a sweep.

    Args:
        path: the sweep's folder, or its ``results.csv``.

    Returns:
        A pandas ``DataFrame`` where pandas is installed, else a list of dictionaries; a row per cell and selection
        rule. Numbers are numbers; empty cells are None (NaN in a column of numbers).

    Raises:
        UsageError: no such file, or another one.
    """
    rows = read_results(Path(path))
    try:
        pandas = importlib.import_module("pandas")
    except ModuleNotFoundError:
        return rows
    return pandas.DataFrame(rows, columns=list(COLUMNS))


def read_results(path: Path) -> list[Row]:
    """Read the rows that ``write_results`` wrote to a file, or to ``results.csv`` in a folder.

    Raises:
        UsageError: no such file, or another one.
    """
    file = path / "results.csv" if path.is_dir() else path
    try:
        reader = csv.reader(io.StringIO(read_bytes(file).decode("utf-8"), newline=""))
        header, *lines = reader
    except (UnicodeDecodeError, csv.Error, ValueError) as failure:
        if isinstance(failure, UsageError):
            raise
        raise _damaged(f"{file}, which is none") from None
    known = {"cell", "rule", "role", "seed", *MEASURED}
    if not known <= set(header) or any(len(line) != len(header) for line in lines):
        raise _damaged(f"{file} with other columns")
    return [
        {name: _value(name, cell) for name, cell in zip(header, line, strict=True)}
        for line in lines
    ]


def _damaged(got: str) -> UsageError:
    return usage_error("results", "the results.csv of a sweep", got, "name the sweep's folder")


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, (tuple, list)):
        return as_text(value) if value else ""
    return value


def _value(name: str, cell: str) -> Any:
    if cell == "":
        return None
    if name in _WORDS:
        return cell
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(cell)
    return {"true": True, "false": False}.get(cell, cell)


def _on_gpu(record: dict[str, Any]) -> bool:
    return "gpu" in record["machine"] and record["settings"]["device"] != "cpu"


def _timed(rows: Sequence[Row]) -> list[Row]:
    """Return one row per training pass and one per evaluation, which repeats its time in each row."""
    return [r for r in rows if (r["split"], r["heads"]) in (("train", "all"), ("val_id", "all"))]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file's lock: a process that read less must not write over what one that read more has written."""
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
