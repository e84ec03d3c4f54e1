"""One training's whole state, as a checkpoint: weights, optimizer, epoch, rows, best so far."""

import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, expected
from ..files import FileError, reading, writing
from ..models import DiverseViT
from .config import Settings
from .files import DamagedError, out_of_memory, read_sealed, write_sealed
from .metrics import COLUMNS, SELECTED, Row

_FORMAT = 2
_NEEDED = ("method", "seed", "epoch", "split", "heads", "accuracy")  # in every row
_UNSEALED = 1  # the format that had no checksum
_NOT_DECISIVE = (
    "methods",
    "seeds",
    "download",
    "tensorboard",
    "fsdp",
)  # no effect on one training's numbers but for rounding


@dataclass(frozen=True)
class Task:
    """One training: a method on a seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-seed{self.seed}"


@dataclass
class State:
    """A training after ``epoch`` epochs.

    Attributes:
        trained: what the steps call: ``model``, or what trains it on several ranks.
        rows: its rows of ``metrics.csv`` so far.
        best: ``"epoch"`` of the selected head and the ``"weights"`` of that epoch.
        cosines: ``"before"`` training and ``"after"`` the last epoch, each H x H.
    """

    model: DiverseViT
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    rows: list[Row] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    cosines: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, settings: Settings, task: Task, dataset: Any, device: torch.device) -> "State":
        """New weights and optimizer; every method of a seed starts from the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(task.seed)
            model = DiverseViT(
                image_size=tuple(dataset.image_size),
                num_classes=dataset.num_classes,
                **settings.model,
            )
        model.to(device)
        return cls(model, model, adam(model, settings, task))

    def finish_epoch(self, rows: list[Row], cosines: list[list[float]]) -> None:
        """Count one more epoch, and keep its weights if it holds the selected head so far."""
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
        """Continue from the checkpoint in ``path``; only tensors and plain values are unpickled.

        Raises:
            UsageError: the file cannot be read, is damaged, or belongs to another run.
        """
        content = read(path)
        self.accept(content, settings, task, path)
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (KeyError, RuntimeError, ValueError) as failure:
            raise foreign(path, f"one that does not fit ({type(failure).__name__})") from None

    def history(self, settings: Settings, task: Task) -> dict[str, Any]:
        """All of a checkpoint but the weights and the optimizer's state."""
        return {
            "format": _FORMAT,
            "run": _identity(settings, task),
            "epoch": self.epoch,
            "rows": self.rows,
            "best": self.best,
            "cosines": self.cosines,
        }

    def accept(self, content: Any, settings: Settings, task: Task, path: Path) -> None:
        """Take over a ``history`` read from ``path``.

        Raises:
            UsageError: it is none, or another run's.
        """
        if not isinstance(content, dict) or content.get("format") not in (_FORMAT, _UNSEALED):
            raise foreign(path, "another format")
        if content.get("run") != _identity(settings, task):
            raise foreign(path, "the checkpoint of another run")
        try:
            for name in ("epoch", "rows", "best", "cosines"):
                setattr(self, name, content[name])
            fits = _are_rows(self.rows) and type(self.epoch) is int and self.epoch >= 0
            fits = fits and isinstance(self.best, dict) and isinstance(self.cosines, dict)
        except KeyError:
            fits = False
        if not fits:
            raise foreign(path, "one that does not fit")


def _are_rows(rows: Any) -> bool:
    """Whether they are those of ``metrics.csv``: names of columns, and values of their kind or none."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(
            k in COLUMNS and (v is None or isinstance(v, (COLUMNS[k], int))) for k, v in row.items()
        )
        and all(isinstance(row.get(k), COLUMNS[k]) for k in _NEEDED)
        for row in rows
    )


def adam(model: nn.Module, settings: Settings, task: Task) -> torch.optim.Optimizer:
    """The optimizer of ``task`` for the parameters of ``model``."""
    return torch.optim.Adam(model.parameters(), lr=settings.base_lr(task.method))


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Write what ``read`` reads; an error leaves what was there.

    Raises:
        FileError: the system refuses.
    """
    file = io.BytesIO()
    with writing(path):
        torch.save(content, file)
    write_sealed(path, file.getvalue())


def read(path: Path, what: str = "it") -> Any:
    """What ``write_content`` wrote to ``path``; only tensors and plain values are unpickled.

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


def foreign(path: Path, got: str, what: str = "it") -> UsageError:
    """The error for a checkpoint that this training cannot continue from; deleting ``what`` helps."""
    cure = f"delete {what} to train that seed from the start, then resume again"
    return expected("checkpoint", f"an intact one of this run in {path}", got, cure)


def _identity(settings: Settings, task: Task) -> str:
    decisive = {k: v for k, v in settings.to_json().items() if k not in _NOT_DECISIVE}
    return json.dumps({"task": str(task), **decisive}, sort_keys=True)
