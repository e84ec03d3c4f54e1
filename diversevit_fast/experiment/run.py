"""A whole run: every method on every seed, in a folder that is partial until it is finished.

While it runs everything lies in ``<out>.partial``; the folder takes its name at the end. A killed
run loses at most the current epoch: ``resume`` goes on from the last checkpoint, to the same end.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..data import load_splits
from ..errors import expected, require
from ..models import DiverseViT
from .config import Settings, read_json
from .files import write_json
from .machine import describe_machine, versions
from .metrics import write_csv
from .progress import Progress
from .report import write_report
from .state import State, Task
from .train import head_diversity, train

_CHECKPOINTS = "checkpoints"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``folder`` can be resumed."""

    def __init__(self, folder: Path):
        super().__init__(f"interrupted; continue with: diversevit run --resume {folder}")
        self.folder = folder


def run(settings: Settings, out: str | Path, *, console: Any = None) -> Path:
    """Train, evaluate, select heads, report; everything lands in the new folder ``out``.

    Args:
        settings: see ``resolve``.
        out: a folder that does not exist yet.
        console: a rich console; a new one on standard output if None.

    Returns:
        The folder: ``report.html``, ``metrics.csv``, ``config.json``, plots and weights.

    Raises:
        UsageError: the folder exists, the data are missing, the loss diverged, ...
        Interrupted: Ctrl-C.
    """
    out = Path(out)
    partial = out.with_name(f"{out.name}.partial")
    for folder, cure in (
        (out, "choose another --out"),
        (partial, f"continue with --resume {out}, or choose another --out"),
    ):
        if folder.exists():
            raise expected("out", "a new folder", f"{folder}, which exists", cure)
    _require_extras(settings)
    splits = _load(settings)
    device = choose_device(settings.device)
    rehearsal = State.fresh(settings, Task("diversevit", 0), splits["train"], device)
    head_diversity(settings, rehearsal.model)  # refuses sizes and layers before anything is written
    record = {
        "settings": settings.to_json(),
        "splits": {name: fingerprint(dataset) for name, dataset in splits.items()},
        "versions": versions(),
        "machine": describe_machine(),
        "threads": settings.threads or torch.get_num_threads(),
    }
    partial.mkdir(parents=True)
    write_json(partial / "config.json", record)
    return _continue(settings, splits, record, partial, out, console)


def resume(folder: str | Path, *, console: Any = None) -> Path:
    """Finish a run that was killed or interrupted; on a CPU bit for bit as if it had not been.

    Args:
        folder: the run's ``out``, with or without ``.partial``.

    Raises:
        UsageError: nothing to resume, or a checkpoint, the configuration or the data do not fit.
    """
    folder = Path(folder)
    out = folder.with_name(folder.name.removesuffix(".partial"))
    partial = out.with_name(f"{out.name}.partial")
    if not partial.is_dir():
        finished = (out / "report.html").exists()
        got = f"{out}, which is finished" if finished else f"no folder {partial}"
        cure = "open its report.html" if finished else "check the path, or start a run with --out"
        raise expected("resume", "an unfinished run", got, cure)
    if out.exists():
        raise expected(
            "resume", f"no finished folder {out}", "one that exists", "move it away first"
        )
    record = read_json(partial / "config.json", "resume")
    if not isinstance(record.get("settings"), dict):
        got = f"{partial / 'config.json'} without settings"
        raise expected("resume", "the configuration of a run", got, "start a new run")
    settings = Settings.from_json(record["settings"])
    _require_extras(settings)
    splits = _load(settings)
    if record.get("splits") != {name: fingerprint(dataset) for name, dataset in splits.items()}:
        cure = "restore the data it started with, or start a new run"
        raise expected("data", f"the data that {partial} started with", "other data", cure)
    return _continue(settings, splits, record, partial, out, console)


def fingerprint(dataset: Any) -> dict[str, Any]:
    """How many samples a split has, how many per group, and a digest of all of it."""
    digest = hashlib.sha256()
    for tensor in (dataset.images, dataset.labels, dataset.groups):
        digest.update(tensor.contiguous().numpy().tobytes())
    counts = torch.bincount(dataset.groups, minlength=len(dataset.group_names)).tolist()
    return {
        "samples": len(dataset.labels),
        "groups": dict(zip(dataset.group_names, counts, strict=True)),
        "sha256": digest.hexdigest(),
    }


def choose_device(name: str) -> torch.device:
    """``"auto"``: CUDA where the GPU kernels can run, else the CPU.

    Raises:
        UsageError: PyTorch does not know the device or cannot use it.
    """
    if name == "auto":
        fast = torch.cuda.is_available() and backends.unavailable()["triton"] is None
        return torch.device("cuda" if fast else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise expected(
            "device", "auto, or a device of this machine", repr(name), "use cpu"
        ) from None
    return device


def _require_extras(settings: Settings) -> None:
    """Say what is missing before the training rather than after it."""
    wanted = ["matplotlib", "jinja2", "safetensors", "rich"]
    for module in wanted + ["tensorboard"] * settings.tensorboard:
        require(module, extra="train")


def _load(settings: Settings) -> Mapping[str, Any]:
    return load_splits(
        settings.data,
        source=settings.source,
        seed=settings.data_seed,
        correlation=settings.correlation,
        samples=settings.samples,
        download=settings.download,
    )


def _continue(
    settings: Settings,
    splits: Mapping[str, Any],
    record: Mapping[str, Any],
    partial: Path,
    out: Path,
    console: Any,
) -> Path:
    """Train what is not trained yet, write the artefacts, give the folder its name."""
    device = choose_device(settings.device)
    console = console or require("rich.console", extra="train").Console()
    checkpoints = partial / _CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(record["threads"])
    rows, cosines = [], {}
    try:
        with Progress(
            console, partial / "tensorboard" if settings.tensorboard else None
        ) as progress:
            for seed in settings.seeds:
                for method in settings.methods:
                    task = Task(method, seed)
                    path = checkpoints / f"{task}.pt"
                    state = train(settings, task, splits, path, progress, device)
                    _save_weights(state, task, partial)
                    rows += state.rows
                    cosines[str(task)] = state.cosines
        write_csv(rows, partial / "metrics.csv")
        write_json(partial / "cosines.json", cosines)
        write_report(partial)
        shutil.rmtree(checkpoints)
        os.rename(partial, out)
    except KeyboardInterrupt:
        raise Interrupted(partial) from None
    finally:
        torch.set_num_threads(before)
    return out


def _save_weights(state: State, task: Task, folder: Path) -> None:
    """The weights of the last epoch, and those of the selected head's epoch."""
    state.model.save(folder / f"{task}-last.safetensors")
    selected = DiverseViT(**state.model.config)
    selected.load_state_dict(state.best["weights"])
    selected.save(folder / f"{task}.safetensors")
