"""Read runs, finished or not, and join the trainings of several into one table.

Nothing is written into a run's folder, so a run that goes on in another process can be looked at.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import usage_error
from ..files import FileError, StrPath, path_exists
from .checkpoint import NOT_DECISIVE, Task, progress_of, read
from .config import METHODS, Settings, read_json
from .metrics import COLUMNS, Row, of_run, read_csv
from .origin import factors_of
from .progress import NAMES
from .run_folder import Place
from .schedule import in_words

_UNIMPORTANT = {
    *NOT_DECISIVE,
    *("preset", "source", "metadata", "threads", "device", "schedule_epochs"),
}
"""Settings that may differ: fingerprints and learning rates are compared, the rest changes rounding."""
_OF_METHOD = {
    "erm": {"erm_lr"},
    "diversevit": {"lr", "penalty_weight", "every", "fraction"},
}


@dataclass(frozen=True)
class Trainings:
    """What one run, or several joined, have trained so far.

    Attributes:
        name: of the folder, or of the folders.
        settings: of the run; of several what they share.
        record: ``config.json``.
        rows: as those of ``metrics.csv``.
        cosines: as ``cosines.json``.
        missing: a line for each training that is not finished.
        parts: the runs that were joined; none in a run by itself.
    """

    name: str
    settings: Settings
    record: Mapping[str, Any]
    rows: list[Row]
    cosines: dict[str, Any]
    missing: list[str]
    parts: tuple["Trainings", ...] = ()

    def finished(self) -> "Trainings":
        """Return the finished trainings alone."""
        last = self.settings.epochs
        whole = {(r["method"], r["seed"]) for r in self.rows if r["epoch"] == last}
        rows = [r for r in self.rows if (r["method"], r["seed"]) in whole]
        names = {str(Task(*task)) for task in whole}
        cosines = {task: value for task, value in self.cosines.items() if task in names}
        return replace(self, rows=rows, cosines=cosines)


def read_run(folder: StrPath) -> Trainings:
    """Read a run's folder, named as when it is finished or with ``.partial``.

    Raises:
        UsageError: no run is there, its files are damaged, or no epoch is finished.
    """
    place = Place.of(folder)
    try:
        if not path_exists(Path(folder) / "metrics.csv") and path_exists(place.record):
            return _unfinished(place)
    except FileError:
        if path_exists(place.partial):
            raise
    moved = not path_exists(folder) and path_exists(place.out)  # finished meanwhile
    return read_finished(place.out if moved else Path(folder))


def read_finished(folder: Path) -> Trainings:
    """Read the folder of a finished run, or of one that has all its files.

    Raises:
        UsageError: one of ``metrics.csv``, ``config.json``, ``cosines.json`` is missing, damaged, or of no run.
    """
    rows = read_csv(folder / "metrics.csv")
    record = read_json(folder / "config.json", "config.json")
    cosines = read_json(folder / "cosines.json", "cosines.json")
    name = folder.name.removesuffix(".partial")
    return Trainings(name, _settings(record, folder), record, rows, cosines, [])


def _unfinished(place: Place) -> Trainings:
    record = read_json(place.record, "config.json")
    settings = _settings(record, place.partial)
    rows: list[Row] = []
    cosines, missing = {}, []
    for seed in settings.seeds:
        for method in settings.methods:
            task = Task(method, seed)
            done, alike, epoch = progress_in(place.checkpoints / f"{task}.pt", settings, task)
            rows += [{name: row.get(name) for name in COLUMNS} for row in done]
            if alike:
                cosines[str(task)] = alike
            if epoch < settings.epochs:
                said = f"{epoch} of {settings.epochs} epochs" if epoch else "not begun"
                missing.append(f"{NAMES[method]} seed {seed}: {said}")
    if not rows:
        hint = "look again after its first epoch"
        raise usage_error("run", "a run with a finished epoch", f"none in {place.partial}", hint)
    return Trainings(place.out.name, settings, record, rows, cosines, missing)


def progress_in(
    path: Path, settings: Settings, task: Task
) -> tuple[list[Row], dict[str, Any], int]:
    """Return rows, cosines and the number of epochs of a training's checkpoint; 0 epochs if there is none.

    Args:
        path: of one process; that of several ranks is the folder without its suffix.

    Raises:
        UsageError: it cannot be read, is damaged, or belongs to another run.
    """
    if path_exists(path):
        return progress_of(read(path), settings, task, path)
    folder = path.with_suffix("")
    if path_exists(folder):
        from .sharded import last_history  # takes a second to import

        found = last_history(folder)
        if found is not None:
            return progress_of(found, settings, task, folder)
    return [], {}, 0


def _settings(record: Mapping[str, Any], folder: Path) -> Settings:
    given = record.get("settings")
    if not isinstance(given, dict) or not isinstance(record.get("splits"), dict):
        wanted, got = f"the files of a run in {folder}", "config.json without settings or splits"
        raise usage_error("report", wanted, got, "mend that, or repeat the run")
    return Settings.from_json(given)


def join(runs: Sequence[Trainings]) -> Trainings:
    """Join the trainings of runs that differ in seeds or methods alone; one run stays as it is.

    Settings of a method count only where it was trained.

    Raises:
        UsageError: a setting or the data differ, or two runs trained the same; the message names which.
    """
    if len(runs) == 1:
        return runs[0]
    shared: dict[str, Any] = {}
    holder: dict[str, str] = {}
    for run in runs:
        _same_data(runs[0], run)
        for key, value in _decisive(run):
            if shared.setdefault(key, value) != value:
                got = f"{shared[key]} in {holder[key]}, {value} in {run.name}"
                hint = "report these runs apart"
                raise usage_error("runs", f"the same {key} in all", got, hint)
            holder.setdefault(key, run.name)
        _same_schedule(runs[0], run)
    trained = _trained(runs)
    settings = {
        **runs[0].settings.to_json(),
        **shared,
        "methods": tuple(m for m in METHODS if any(m == task.method for task in trained)),
        "seeds": tuple(sorted({task.seed for task in trained})),
    }
    rows = [r for task, run in trained.items() for r in of_run(run.rows, task.method, task.seed)]
    cosines = {str(task): run.cosines[str(task)] for task, run in trained.items()}
    return Trainings(
        ", ".join(run.name for run in runs),
        Settings.from_json(settings),
        runs[0].record,
        rows,
        cosines,
        [f"{run.name}: {line}" for run in runs for line in run.missing],
        tuple(runs),
    )


def _decisive(run: Trainings) -> Iterator[tuple[str, Any]]:
    """Yield the settings that decided what ``run`` trained."""
    idle = {
        k for method in METHODS if method not in run.settings.methods for k in _OF_METHOD[method]
    }
    for key, value in run.settings.to_json().items():
        if key not in _UNIMPORTANT | idle:
            yield key, value


def _same_data(one: Trainings, other: Trainings) -> None:
    here, there = one.record["splits"], other.record["splits"]
    different = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if different:
        got = f"other images for {', '.join(different)} in {one.name} and {other.name}"
        raise usage_error("runs", "the same data in all", got, "report these runs apart")


def _same_schedule(one: Trainings, other: Trainings) -> None:
    rates = [in_words(factors_of(run.settings, run.record)) for run in (one, other)]
    if rates[0] != rates[1]:
        got = f"{rates[0]} in {one.name}, {rates[1]} in {other.name}"
        hint = "report these runs apart"
        raise usage_error("runs", "the same schedule of the learning rate in all", got, hint)


def _trained(runs: Sequence[Trainings]) -> dict[Task, Trainings]:
    """Return, in order of seed and method, which run has the rows of each training."""
    found: dict[Task, Trainings] = {}
    for run in runs:
        for task in dict.fromkeys(Task(r["method"], r["seed"]) for r in run.rows):
            if task.method not in METHODS or not isinstance(run.cosines.get(str(task)), dict):
                wanted, hint = f"the files of a run in {run.name}", "mend that, or repeat the run"
                raise usage_error("report", wanted, f"{task} without cosines", hint)
            if task in found:
                got = f"{task} in {found[task].name} and {run.name}"
                raise usage_error("runs", "every training once", got, "leave one of them out")
            found[task] = run
    order = sorted(found, key=lambda task: (task.seed, METHODS.index(task.method)))
    return {task: found[task] for task in order}


def load_metrics(runs: StrPath | Sequence[StrPath]) -> Any:
    """Return the metrics of one or several runs, finished or not, as a table.

    >>> table = dvf.experiment.load_metrics(["runs/a", "runs/b"])

    Args:
        runs: a run's folder, or several; they may differ in anything.

    Returns:
        A ``pandas.DataFrame`` where pandas is installed, else a list of dictionaries: the columns of
        ``metrics.csv`` (accuracies and losses without unit, seconds) after ``run``, the folder's name.

    Raises:
        UsageError: no run is there, or its files are damaged.
    """
    folders = [runs] if isinstance(runs, (str, bytes)) or not isinstance(runs, Sequence) else runs
    read = [read_run(folder) for folder in folders]
    rows = [{"run": run.name, **row} for run in read for row in run.rows]
    if "pandas" in sys.modules or find_spec("pandas") is not None:
        return importlib.import_module("pandas").DataFrame(rows)
    return rows
