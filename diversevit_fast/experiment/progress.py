"""Show the progress of a run: a live bar on a terminal, plain lines elsewhere, and event files."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import require
from ..files import make_folder
from .checkpoint import Task
from .metrics import Row
from .terminal import is_quiet

NAMES = {"erm": "ERM", "diversevit": "DiverseViT"}
EVERY = 0.25  # seconds between two updates of the live bar


@dataclass
class _Training:
    """Progress of one training: what it has to do, what was done before this process, and what in it."""

    epochs: int
    steps: int  # of an epoch
    before: int  # epochs
    begun: float
    line: Any  # of the live bar
    epoch: int  # the last one that is done
    stepped: int = 0
    shown: float = 0.0


class Progress:
    """A ``train.Watcher`` that talks to a rich console; a context manager, for the live bar.

    The time left is an estimate from the epochs and steps since this process began: the run's, at the end of each
    epoch's line and in the bar's last line; a training's, in its line of the bar.

    Args:
        console: a ``rich.console.Console``.
        tensorboard: folder for event files, one run per training; None for none.
        trainings: how many trainings the run has.
    """

    def __init__(self, console: Any, tensorboard: Path | None = None, trainings: int = 1):
        self._console = console
        self._events = tensorboard
        self._writers: dict[Task, Any] = {}
        self._trainings: dict[Task, _Training] = {}
        self._expected = trainings
        self._whole: Any = None  # the run's line of the bar
        self._bar: Any = None
        if console.is_terminal and not is_quiet.get():
            columns = require("rich.progress", extra="train")
            self._bar = columns.Progress(
                columns.TextColumn("{task.description}"),
                columns.BarColumn(bar_width=24),
                columns.MofNCompleteColumn(),
                columns.TextColumn("{task.fields[note]}"),
                columns.TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
            )

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        for task in list(self._writers):
            self._close(task)

    def noted(self, line: str) -> None:
        """Print a note for the reader."""
        self._note(line)

    def started(self, task: Task, epoch: int, epochs: int, steps: int) -> None:
        line = None
        if self._bar is not None and epoch < epochs:
            line = self._bar.add_task(_title(task), total=epochs * steps, note="", left="")
            self._bar.update(line, completed=epoch * steps)
        self._trainings[task] = _Training(epochs, steps, epoch, time.perf_counter(), line, epoch)
        self._show_run()
        if epoch == epochs:
            self._print(f"{_title(task)}: trained before")
            return
        where = f"continues after epoch {epoch}" if epoch else f"{epochs} epochs of {steps} steps"
        self._print(f"{_title(task)}: {where}")
        if self._events is not None:
            with self._dispensable():
                self._open(self._events, task, epoch)

    def stepped(self, task: Task, loss: float, penalty: float | None, steps: int = 1) -> None:
        training = self._trainings[task]
        training.stepped += steps
        now = time.perf_counter()
        if self._bar is None or now - training.shown < EVERY:
            return
        training.shown = now
        rate = training.stepped / (now - training.begun)
        done = training.before * training.steps + training.stepped
        total = training.epochs * training.steps
        self._bar.update(
            training.line,
            completed=done,
            note=f"{rate:.1f} steps/s, loss {loss:.3f}{_penalty(penalty)}",
            left=_time((total - done) / rate),
        )

    def epoch_done(self, task: Task, epoch: int, rows: list[Row]) -> None:
        trained = rows[0]
        at = {(row["split"], row["heads"]): row["accuracy"] for row in rows[1:]}
        best = max(
            value for (split, heads), value in at.items() if split == "val_ood" and heads != "all"
        )
        training = self._trainings[task]
        training.epoch = epoch
        epochs = training.epochs
        self._print(
            f"{_title(task)}, epoch {epoch:>{len(str(epochs))}}/{epochs}: "
            f"{trained['steps_per_second']:.1f} steps/s, loss {trained['loss']:.3f}"
            f"{_penalty(trained['penalty'])}, validation ID {at['val_id', 'all']:.3f}, "
            f"OOD {at['val_ood', 'all']:.3f}, best head OOD {best:.3f}{self._left_of_run()}"
        )
        self._show_run()
        if task in self._writers:
            with self._dispensable():
                self._record(self._writers[task], epoch, rows)
        if epoch == epochs:
            self._close(task)
            if self._bar is not None:
                self._bar.remove_task(training.line)

    def _epochs(self) -> tuple[int, int, int]:
        """Count the run's epochs: of all trainings, those that are done, and those done by this process."""
        known = self._trainings.values()
        done = sum(one.epoch for one in known)
        of_one = max((one.epochs for one in known), default=0)
        return self._expected * of_one, done, done - sum(one.before for one in known)

    def _left_of_run(self) -> str:
        total, done, here = self._epochs()
        if not here or done >= total:
            return ""
        spent = time.perf_counter() - min(one.begun for one in self._trainings.values())
        return f", {_time((total - done) * spent / here)}"

    def _show_run(self) -> None:
        """Bring the bar's line of the whole run up to date; it comes last, below the trainings."""
        if self._bar is None or self._expected < 2:
            return
        total, done, _ = self._epochs()
        if self._whole is not None:
            self._bar.remove_task(self._whole)
        finished = sum(one.epoch == one.epochs for one in self._trainings.values())
        note = f"epochs; {finished} of {self._expected} trainings"
        left = self._left_of_run().lstrip(", ")
        self._whole = self._bar.add_task(
            "whole run", total=total, completed=done, note=note, left=left
        )

    def _open(self, events: Path, task: Task, epoch: int) -> None:
        module = require("torch.utils.tensorboard", extra="train")
        folder = events / str(task)
        for path in (events, folder):
            make_folder(path)
        self._writers[task] = module.SummaryWriter(str(folder), purge_step=epoch + 1)

    def _record(self, writer: Any, epoch: int, rows: list[Row]) -> None:
        for row in rows:
            for name in ("accuracy", "worst_group", "loss", "penalty"):
                if row.get(name) is not None:
                    tag = f"{name}/{row['split']}/heads {row['heads']}"
                    writer.add_scalar(tag, row[name], epoch)
        writer.flush()

    def _close(self, task: Task) -> None:
        writer = self._writers.pop(task, None)
        if writer is not None:
            with self._dispensable():
                writer.close()

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        """Context manager: ignore failures of the event files; a run goes on without them."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as failure:
            self._writers, self._events = {}, None
            self._note(f"no more event files: {' '.join(str(failure).split())}")

    def _print(self, line: str) -> None:
        """Print a line of progress, unless ``--quiet`` was given."""
        if not is_quiet.get():
            self._note(line)

    def _note(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _title(task: Task) -> str:
    return f"{NAMES[task.method]} seed {task.seed}"


def _time(seconds: float) -> str:
    return f"{timedelta(seconds=round(seconds))} left"


def _penalty(value: float | None) -> str:
    return "" if value is None else f", penalty {value:.4f}"
