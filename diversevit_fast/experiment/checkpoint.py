"""Save and restore one training: weights, optimizer, epoch, rows, best weights so far."""

import io
import json
import math
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError, usage_error
from ..files import FileError, reading, writing
from .config import Settings
from .metrics import COLUMNS, EVALUATED, SELECTED, Row
from .models import Architecture, architecture_of, number_of_heads
from .recipe import make_optimizer, moments
from .run_files import DamagedError, out_of_memory, read_sealed, write_sealed

_FORMAT = 2
_NAMES = ("method", "seed", "epoch", "split", "heads")  # of a row
_NUMBERS = ("accuracy", "worst_group", "loss")  # in every row
_UNSEALED = 1  # the format that had no checksum
NOT_DECISIVE = (
    "methods",
    "seeds",
    "download",
    "tensorboard",
    "workers",
    "fsdp",
    "graph",
    "keep_checkpoints",
)  # no effect on one training's numbers but for rounding


@dataclass(frozen=True)
class Task:
    """One training: a method and a seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-seed{self.seed}"


@dataclass
class State:
    """State of a training after ``epoch`` epochs.

    Attributes:
        trained: what the steps call: ``model``, or what trains it on several ranks.
        architecture: builds and saves the model.
        rows: its rows of ``metrics.csv`` so far.
        best: ``"epoch"`` of the selected head and the ``"weights"`` of that epoch.
        cosines: ``"before"`` training and ``"after"`` the last epoch, each H x H.
    """

    model: nn.Module
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    architecture: Architecture
    epoch: int = 0
    rows: list[Row] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    cosines: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, settings: Settings, task: Task, dataset: Any, device: torch.device) -> "State":
        """Create new weights and optimizer; every method of a seed starts from the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            architecture = architecture_of(settings, dataset)
            model = architecture.build()
        model.to(device)
        return cls(model, model, make_optimizer(model, settings, task.method), architecture)

    def finish_epoch(self, rows: list[Row], cosines: list[list[float]]) -> None:
        """Advance to the next epoch, and keep its weights if it holds the selected head so far."""
        self.epoch += 1
        self.rows += rows
        self.cosines["after"] = cosines
        if SELECTED.pick(self.rows)["epoch"] == self.epoch:
            weights = {
                name: x.detach().cpu().clone() for name, x in self.model.state_dict().items()
            }
            self.best = {"epoch": self.epoch, "weights": weights}

    def save(self, settings: Settings, task: Task, path: Path) -> None:
        """Write the checkpoint; a crash leaves the previous one whole."""
        content = {
            **self.history(settings, task),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_content(path, content)

    def restore(self, settings: Settings, task: Task, path: Path) -> None:
        """Restore the checkpoint in ``path``; only tensors and plain values are unpickled.

        Raises:
            UsageError: the file cannot be read, is damaged, or belongs to another run.
        """
        content = read(path)
        self.accept(content, settings, task, path)
        model, optimizer = content.get("model"), content.get("optimizer")
        held = optimizer.get("state") if isinstance(optimizer, dict) else None
        fresh = self.optimizer.state_dict()["param_groups"]
        if not _alike(model, self.model.state_dict()) or not _alike(
            held, moments(self.model, settings)
        ):
            raise foreign(path, "one that does not fit")
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict({"state": held, "param_groups": fresh})

    def history(self, settings: Settings, task: Task) -> dict[str, Any]:
        """Return all of a checkpoint except weights and optimizer state."""
        return {
            "format": _FORMAT,
            "run": _identity(settings, task),
            "epoch": self.epoch,
            "rows": self.rows,
            "best": self.best,
            "cosines": self.cosines,
        }

    def accept(self, content: Any, settings: Settings, task: Task, path: Path) -> None:
        """Restore a ``history`` read from ``path``.

        Raises:
            UsageError: it is none, or another run's.
        """
        known = (json.dumps(number) for number in (_FORMAT, _UNSEALED))
        if not isinstance(content, dict) or repr(content.get("format")) not in known:
            raise foreign(path, "another format")
        held: list[Any] = [content.get(k) for k in ("run", "epoch", "rows", "best", "cosines")]
        run, epoch, rows, best, cosines = held
        if not _is_identity(run, settings, task):
            raise foreign(path, "the checkpoint of another run")
        if (
            not _is_epoch(epoch, settings.epochs)
            or not _are_rows(rows, task, epoch, heads := number_of_heads(self.model))
            or not _alike(best, {"epoch": 1, "weights": self.model.state_dict()})
            or not _is_epoch(best["epoch"], epoch)
            or not _alike(cosines, dict.fromkeys(("before", "after"), [[0.0] * heads] * heads))
        ):
            raise foreign(path, "one that does not fit")
        self.epoch, self.rows, self.best, self.cosines = epoch, rows, best, cosines


def _alike(value: Any, pattern: Any) -> bool:
    """Return True if ``value`` has the types, keys, lengths, shapes and dtypes of ``pattern``."""
    if isinstance(pattern, Tensor):  # a checkpoint is read into the CPU's memory
        return (
            isinstance(value, Tensor)
            and value.device.type == "cpu"
            and value.layout == pattern.layout
            and (value.dtype, value.shape) == (pattern.dtype, pattern.shape)
        )
    if isinstance(pattern, dict):
        return (
            isinstance(value, dict)
            and value.keys() == pattern.keys()
            and all(_alike(value[name], pattern[name]) for name in pattern)
        )
    if type(value) is not type(pattern):
        return False
    return not isinstance(pattern, list) or (
        len(value) == len(pattern) and all(map(_alike, value, pattern))
    )


def _is_epoch(value: Any, last: int) -> bool:
    return type(value) is int and 1 <= value <= last


def _are_rows(rows: Any, task: Task, epochs: int, heads: int) -> bool:
    """Return True if these are the rows of ``metrics.csv`` of ``task`` after ``epochs`` epochs."""
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        return False
    found = [tuple(row[name] for name in _NAMES) for row in rows]
    choices = [("train", "all")]
    choices += [(split, str(i)) for split in EVALUATED for i in ("all", *range(heads))]
    wanted = [(*vars(task).values(), epoch + 1, *c) for epoch in range(epochs) for c in choices]
    return sorted(found) == sorted(wanted)


def _is_row(row: Any) -> bool:
    """Return True if keys are column names and each value is of its column's kind or None; no NaN."""
    return (
        isinstance(row, dict)
        and all(k in COLUMNS and type(v) in (COLUMNS[k], int, type(None)) for k, v in row.items())
        and all(type(row.get(k)) is COLUMNS[k] for k in (*_NAMES, *_NUMBERS))
        and all(math.isfinite(row[k]) for k in _NUMBERS)
    )


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint for ``read``; an error leaves the previous file.

    Raises:
        FileError: the system refuses.
    """
    file = io.BytesIO()
    with writing(path):
        torch.save(content, file)
    write_sealed(path, file.getvalue())


def read(path: Path, what: str = "it") -> Any:
    """Read what ``write_content`` wrote to ``path``; only tensors and plain values are unpickled.

    ``what`` is to be deleted if it is damaged. A file of before there were checksums is held against
    those that its parts have.

    Raises:
        UsageError: the file cannot be read, or is damaged.
    """
    try:
        data, sealed = read_sealed(path)
    except DamagedError:
        raise foreign(path, "a damaged one, which does not fit its checksum", what) from None
    try:
        if not sealed:
            _check_parts(data)
        with reading(path):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileError:
        raise
    except Exception as failure:  # on a damaged file the unpickler can raise anything
        if out_of_memory(failure):
            with reading(path):
                raise MemoryError from None
        raise foreign(path, _unreadable(failure, sealed), what) from None
    if not sealed and isinstance(content, dict) and content.get("format") == _FORMAT:
        raise foreign(path, "a damaged one, without its checksum", what)
    return content


def _check_parts(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as parts:
        if parts.testzip() is not None:
            raise zipfile.BadZipFile


def _unreadable(failure: Exception, sealed: bool) -> str:
    if sealed:
        return f"one that PyTorch {torch.__version__} does not load ({type(failure).__name__})"
    return f"a damaged one ({type(failure).__name__})"


class ForeignError(UsageError):
    """Raised for a checkpoint that a training cannot go on from; ``got`` says what it is instead."""

    got = ""


def foreign(path: Path, got: str, what: str = "it") -> UsageError:
    """Return the error for a checkpoint this training cannot continue from; deleting ``what`` helps."""
    hint = f"delete {what} to train that seed from the start, then resume again"
    wanted = f"an intact one of this run in {path}"
    failure = ForeignError(str(usage_error("checkpoint", wanted, got, hint)))
    failure.got = got
    return failure


def _identity(settings: Settings, task: Task) -> str:
    decisive = {k: v for k, v in settings.to_json().items() if k not in NOT_DECISIVE}
    return json.dumps({"task": str(task), **decisive}, sort_keys=True)


def _is_identity(run: Any, settings: Settings, task: Task) -> bool:
    """Return True if ``run`` is what ``_identity`` returns, or did before settings were added.

    A setting that an older version did not have was what its default says now.
    """
    try:
        stored = json.loads(run)
    except (RecursionError, TypeError, ValueError):
        return False
    wanted, defaults = (json.loads(_identity(s, task)) for s in (settings, Settings()))
    return isinstance(stored, dict) and {**defaults, "task": None, **stored} == wanted


def progress_of(
    content: Any, settings: Settings, task: Task, path: Path
) -> tuple[list[Row], dict[str, Any], int]:
    """Return rows, cosines and epoch of a ``history`` read from ``path``, to be looked at alone.

    Raises:
        UsageError: it is none, or another run's.
    """
    if not isinstance(content, dict) or not _is_identity(content.get("run"), settings, task):
        raise foreign(path, "the checkpoint of another run")
    held: list[Any] = [content.get(name) for name in ("rows", "cosines", "epoch")]
    rows, cosines, epoch = held
    after = cosines.get("after") if isinstance(cosines, dict) else None
    heads = len(after) if isinstance(after, list) else 0
    square = [[0.0] * heads] * heads
    if (
        not _is_epoch(epoch, settings.epochs)
        or not _are_rows(rows, task, epoch, heads)
        or not _alike(cosines, dict.fromkeys(("before", "after"), square))
    ):
        raise foreign(path, "one that does not fit")
    return rows, cosines, epoch
