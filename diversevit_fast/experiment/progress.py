"""Show the progress of a run: a live bar on a terminal, plain lines elsewhere, and event files."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import require
from ..files import make_folder
from .checkpoint import Task
from .metrics import Row

NAMES = {"erm": "ERM", "diversevit": "DiverseViT"}
_EVERY = 0.25  # seconds between two updates of the live bar


class Progress:
    """A ``train.Watcher`` that talks to a rich console; a context manager, for the live bar.

    Args:
        console: a ``rich.console.Console``.
        tensorboard: folder for event files, one run per training; None for none.
    """

    def __init__(self, console: Any, tensorboard: Path | None = None):
        self._console = console
        self._events = tensorboard
        self._writer: Any = None
        self._bar: Any = None
        if console.is_terminal:
            columns = require("rich.progress", extra="train")
            self._bar = columns.Progress(
                columns.TextColumn("{task.description}"),
                columns.BarColumn(bar_width=24),
                columns.MofNCompleteColumn(),
                columns.TextColumn("{task.fields[note]}"),
                columns.TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._line = self._bar.add_task("", note="", total=None)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._close()

    def noted(self, line: str) -> None:
        """Print a note for the reader."""
        self._print(line)

    def started(self, task: Task, epoch: int, epochs: int, steps: int) -> None:
        self._epochs, self._done, self._step = epochs, epoch * steps, 0
        self._begun, self._shown = time.perf_counter(), 0.0
        where = f"continues after epoch {epoch}" if epoch else f"{epochs} epochs of {steps} steps"
        self._print(f"{_title(task)}: {where}")
        if self._bar is not None:
            self._bar.reset(self._line, total=epochs * steps, description=_title(task), note="")
            self._bar.update(self._line, completed=self._done)
        if self._events is not None:
            self._close()
            with self._dispensable():
                self._open(self._events, task, epoch)

    def stepped(self, task: Task, loss: float, penalty: float | None) -> None:
        self._step += 1
        now = time.perf_counter()
        if self._bar is None or now - self._shown < _EVERY:
            return
        self._shown = now
        rate = self._step / (now - self._begun)
        note = f"{rate:.1f} steps/s, loss {loss:.3f}{_penalty(penalty)}"
        self._bar.update(self._line, completed=self._done + self._step, note=note)

    def epoch_done(self, task: Task, epoch: int, rows: list[Row]) -> None:
        trained = rows[0]
        at = {(row["split"], row["heads"]): row["accuracy"] for row in rows[1:]}
        best = max(
            value for (split, heads), value in at.items() if split == "val_ood" and heads != "all"
        )
        self._print(
            f"{_title(task)}, epoch {epoch:>{len(str(self._epochs))}}/{self._epochs}: "
            f"{trained['steps_per_second']:.1f} steps/s, loss {trained['loss']:.3f}"
            f"{_penalty(trained['penalty'])}, validation ID {at['val_id', 'all']:.3f}, "
            f"OOD {at['val_ood', 'all']:.3f}, best head OOD {best:.3f}"
        )
        if self._writer is not None:
            with self._dispensable():
                self._record(epoch, rows)

    def _open(self, events: Path, task: Task, epoch: int) -> None:
        module = require("torch.utils.tensorboard", extra="train")
        folder = events / str(task)
        for path in (events, folder):
            make_folder(path)
        self._writer = module.SummaryWriter(str(folder), purge_step=epoch + 1)

    def _record(self, epoch: int, rows: list[Row]) -> None:
        for row in rows:
            for name in ("accuracy", "worst_group", "loss", "penalty"):
                if row.get(name) is not None:
                    tag = f"{name}/{row['split']}/heads {row['heads']}"
                    self._writer.add_scalar(tag, row[name], epoch)
        self._writer.flush()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._dispensable():
                writer.close()

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        """Context manager: ignore failures of the event files; a run goes on without them."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as failure:
            self._writer = self._events = None
            self._print(f"no more event files: {' '.join(str(failure).split())}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _title(task: Task) -> str:
    return f"{NAMES[task.method]} seed {task.seed}"


def _penalty(value: float | None) -> str:
    return "" if value is None else f", penalty {value:.4f}"
