"""One training's whole state, as a checkpoint: weights, optimizer, epoch, rows, best so far."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, expected
from ..models import DiverseViT
from .config import Settings
from .files import write_atomically
from .metrics import SELECTED, Row

_FORMAT = 1
_NOT_DECISIVE = (
    "methods",
    "seeds",
    "download",
    "tensorboard",
)  # no effect on one training's numbers


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
        rows: its rows of ``metrics.csv`` so far.
        best: ``"epoch"`` of the selected head and the ``"weights"`` of that epoch.
        cosines: ``"before"`` training and ``"after"`` the last epoch, each H x H.
    """

    model: DiverseViT
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
        return cls(model, torch.optim.Adam(model.parameters(), lr=settings.base_lr(task.method)))

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
            "format": _FORMAT,
            "run": _identity(settings, task),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "rows": self.rows,
            "best": self.best,
            "cosines": self.cosines,
        }
        write_atomically(path, lambda file: torch.save(content, file))

    def restore(self, settings: Settings, task: Task, path: Path) -> None:
        """Continue from the checkpoint in ``path``; only tensors and plain values are unpickled.

        Raises:
            UsageError: the file is damaged, or belongs to another run.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as failure:  # on a damaged file the unpickler can raise anything
            raise _foreign(path, type(failure).__name__) from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise _foreign(path, "another format")
        if content.get("run") != _identity(settings, task):
            raise _foreign(path, "the checkpoint of another run")
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            for name in ("epoch", "rows", "best", "cosines"):
                setattr(self, name, content[name])
        except (KeyError, RuntimeError, ValueError) as failure:
            raise _foreign(path, f"one that does not fit ({type(failure).__name__})") from None


def _identity(settings: Settings, task: Task) -> str:
    decisive = {k: v for k, v in settings.to_json().items() if k not in _NOT_DECISIVE}
    return json.dumps({"task": str(task), **decisive}, sort_keys=True)


def _foreign(path: Path, got: str) -> UsageError:
    cure = "delete it to train that seed from the start, then resume again"
    return expected("checkpoint", f"an intact one of this run in {path}", got, cure)
