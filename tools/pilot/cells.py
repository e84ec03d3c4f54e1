"""Cells of the pilot: one training each, judged on validation data alone."""

import dataclasses
import io
import json
import resource
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from diversevit_fast.data import batches, load_splits
from diversevit_fast.experiment.checkpoint import Task
from diversevit_fast.experiment.config import Settings, resolve
from diversevit_fast.experiment.distributed import OneProcess
from diversevit_fast.experiment.metrics import SELECTED, find
from diversevit_fast.experiment.progress import Progress
from diversevit_fast.experiment.train import train

LIVE = 0.05  # a head is dead if it predicts one class for all images but this share


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        kind: ``"erm"``, ``"core"`` (ERM on images whose digit is black), or ``"diversevit"``.
        correlation: of digit and label in training.
        lr: of either method.
        penalty_weight: 0 but for ``"diversevit"``.
    """

    kind: str
    correlation: float
    lr: float
    epochs: int
    seed: int
    penalty_weight: float = 0.0

    def settings(self, **changes: Any) -> Settings:
        """Return the settings of the preset ``quick`` with this cell's."""
        options = {"epochs": self.epochs, "correlation": self.correlation, "seeds": (self.seed,)}
        rates = {"lr": self.lr, "erm_lr": self.lr, "penalty_weight": self.penalty_weight}
        return resolve({**options, **rates, "threads": 1, **changes})


def measure(cell: Cell, **changes: Any) -> dict[str, Any]:
    """Train a cell and return what the pilot looks at; ``changes`` are of the settings, for tests.

    Returns:
        The cell's fields, and of OOD validation: ``all``, the accuracy of all heads after the last
        epoch; ``head``, that of the best head then, chosen on one half of the images and measured
        on the other, and the other way round; ``selected``, the best of any head and epoch, which is
        what a run selects; ``live``, the number of heads that are not dead. ``cosine``: mean absolute
        cosine of two heads' gradients. ``cpu_seconds``: processor time of this training.
    """
    begun = _cpu_seconds()
    settings = cell.settings(**changes)
    splits = load_splits(
        settings.data,
        seed=settings.data_seed,
        correlation=settings.correlation,
        samples=settings.samples,
    )
    if cell.kind == "core":
        for split in splits.values():
            split.images[:, :, : split.image_size[0] // 2] = 0
    task = Task("diversevit" if cell.kind == "diversevit" else "erm", cell.seed)
    with tempfile.TemporaryDirectory() as folder, Progress(_silent()) as progress:
        path = Path(folder) / f"{task}.pt"
        state = train(settings, task, splits, path, progress, OneProcess(torch.device("cpu")))
    alone, live = heads_of(state.model, splits["val_ood"])
    matrix = torch.tensor(state.cosines["after"])
    count = len(matrix)
    return {
        **dataclasses.asdict(cell),
        "all": find(state.rows, settings.epochs, "val_ood", "all")["accuracy"],
        "head": alone,
        "selected": SELECTED.pick(state.rows)["accuracy"],
        "live": live,
        "cosine": ((matrix.sum() - matrix.trace()) / max(count * (count - 1), 1)).item(),
        "cpu_seconds": _cpu_seconds() - begun,
    }


@torch.no_grad()
def heads_of(model: Any, dataset: Any) -> tuple[float, int]:
    """Return the best head's accuracy, chosen on one half and measured on the other, and how many live."""
    predicted, labels = [], []
    for images, label, _ in batches(dataset, 256):
        predicted.append(model.head_logits(images)[1:].argmax(-1))
        labels.append(label)
    classes, truth = torch.cat(predicted, dim=1), torch.cat(labels)
    hits = (classes == truth).double()  # [H, n]
    halves = hits[:, ::2], hits[:, 1::2]
    found = 0.0
    for chosen_on, measured_on in (halves, halves[::-1]):
        found += measured_on[chosen_on.mean(1).argmax()].sum().item()
    share = classes.double().mean(1)
    return found / len(truth), int(((share > LIVE) & (share < 1 - LIVE)).sum())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the measured cells; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def measure_missing(cells: Iterable[Cell], path: Path, **changes: Any) -> list[dict[str, Any]]:
    """Measure the cells that ``path`` does not hold yet, one JSON line each; return all lines."""
    lines = read_lines(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    known = {cell_of(line) for line in lines}
    for cell in cells:
        if cell not in known:
            lines.append(measure(cell, **changes))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    return lines


def cell_of(line: Mapping[str, Any]) -> Cell:
    """Return the cell that a line measured."""
    return Cell(**{entry.name: line[entry.name] for entry in dataclasses.fields(Cell)})


def _silent() -> Any:
    from rich.console import Console

    return Console(file=io.StringIO(), quiet=True)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
