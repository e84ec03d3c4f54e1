"""A whole run: every method on every seed, in a folder that is partial until it is finished.

While it runs everything lies in ``<out>.partial``; the folder takes its name at the end. A killed
run loses at most the current epoch: ``resume`` goes on from the last checkpoint, to the same end.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import load_splits
from ..errors import expected, require
from ..models import DiverseViT
from .config import Settings, read_json
from .distributed import OneProcess, noticing_lost_ranks, open_ranks, resume_command
from .files import write_json
from .machine import describe_machine, versions
from .metrics import Row, write_csv
from .progress import Progress
from .report import write_report
from .state import State, Task
from .train import head_diversity, train

_CHECKPOINTS = "checkpoints"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; ``folder`` can be resumed."""

    def __init__(self, folder: Path, command: str):
        super().__init__(f"interrupted; continue with: {command}")
        self.folder = folder


def run(settings: Settings, out: str | Path, *, console: Any = None) -> Path:
    """Train, evaluate, select heads, report; everything lands in the new folder ``out``.

    Under ``torchrun`` all ranks call this and train together; rank 0's ``out`` counts, and it alone
    writes there but for the checkpoints.

    Args:
        settings: see ``resolve``.
        out: a folder that does not exist yet; on several machines one that they share.
        console: a rich console; a new one on standard output if None. Only rank 0 uses it.

    Returns:
        The folder: ``report.html``, ``metrics.csv``, ``config.json``, plots and weights.

    Raises:
        UsageError: the folder exists, the data are missing, the loss diverged, ...
        Interrupted: Ctrl-C.
    """
    with open_ranks(settings.device, fsdp=settings.fsdp) as ranks:
        out = ranks.on_first(lambda: Path(out))
        partial = out.with_name(f"{out.name}.partial")
        ranks.on_first(lambda: _check_new(out, partial))
        splits, prints = _prepare(settings, ranks)
        record = {
            "settings": settings.to_json(),
            "splits": prints,
            "versions": versions(),
            "machine": describe_machine(),
            "threads": settings.threads or torch.get_num_threads(),
            **({"ranks": [ranks.count]} if ranks.launched else {}),
        }
        ranks.on_first(lambda: _create(partial, record))
        return _continue(settings, splits, record, partial, out, console, ranks)


def resume(folder: str | Path, *, console: Any = None) -> Path:
    """Finish a run that was killed or interrupted; on a CPU bit for bit as if it had not been.

    What several ranks left unfinished can be finished by another number of ranks, or by one process,
    to the same end but for rounding (and for what ``fraction`` draws).

    Args:
        folder: the run's ``out``, with or without ``.partial``.

    Raises:
        UsageError: nothing to resume, or a checkpoint, the configuration or the data do not fit.
    """
    folder = Path(folder)
    out = folder.with_name(folder.name.removesuffix(".partial"))
    partial = out.with_name(f"{out.name}.partial")
    record = _read_record(out, partial)
    settings = Settings.from_json(record["settings"])
    with open_ranks(settings.device) as ranks:
        splits, prints = _prepare(settings, ranks)
        if record.get("splits") != prints:
            cure = "restore the data it started with, or start a new run"
            got = expected("data", f"the data that {partial} started with", "other data", cure)
            raise ranks.agreed(got)
        counts = record.get("ranks", [1])
        if counts[-1] != ranks.count:
            record["ranks"] = [*counts, ranks.count]
            ranks.on_first(lambda: write_json(partial / "config.json", record))
        return _continue(settings, splits, record, partial, out, console, ranks)


def _check_new(out: Path, partial: Path) -> None:
    for folder, cure in (
        (out, "choose another --out"),
        (partial, f"continue with --resume {out}, or choose another --out"),
    ):
        if folder.exists():
            raise expected("out", "a new folder", f"{folder}, which exists", cure)


def _create(partial: Path, record: Mapping[str, Any]) -> None:
    partial.mkdir(parents=True)
    write_json(partial / "config.json", record)


def _read_record(out: Path, partial: Path) -> dict[str, Any]:
    """``config.json`` of an unfinished run."""
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
    return record


def _prepare(
    settings: Settings, ranks: OneProcess
) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
    """The data, the same on every rank, and their fingerprints; refuses what cannot be trained."""
    if settings.download:
        ranks.on_first(lambda: _load(settings) and None)  # one fetches, the others find the files

    def prepare() -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
        _require_extras(settings)
        splits = _load(settings)
        rehearsal = State.fresh(settings, Task("diversevit", 0), splits["train"], ranks.device)
        head_diversity(settings, rehearsal.model)
        return splits, {name: fingerprint(dataset) for name, dataset in splits.items()}

    splits, prints = ranks.together(prepare)
    if any(other != prints for other in ranks.gathered(prints)):
        cure = "give every machine the same files"
        raise ranks.agreed(expected("data", "the same on every rank", "different ones", cure))
    return splits, prints


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
    ranks: OneProcess,
) -> Path:
    """Train what is not trained yet, write the artefacts, give the folder its name."""
    checkpoints = partial / _CHECKPOINTS
    ranks.on_first(lambda: checkpoints.mkdir(exist_ok=True))
    before = torch.get_num_threads()
    torch.set_num_threads(record["threads"])
    command = resume_command(partial, ranks)
    try:
        with noticing_lost_ranks(ranks, f"continue with: {command}"):
            rows, cosines = _train_all(settings, splits, partial, console, ranks)
            ranks.on_first(lambda: _finish(rows, cosines, partial, out))
    except KeyboardInterrupt:
        raise Interrupted(partial, command) from None
    finally:
        torch.set_num_threads(before)
    return out


def _train_all(
    settings: Settings,
    splits: Mapping[str, Any],
    partial: Path,
    console: Any,
    ranks: OneProcess,
) -> tuple[list[Row], dict[str, Any]]:
    """Every method on every seed: the rows of ``metrics.csv`` and ``cosines.json``."""
    events = partial / "tensorboard" if settings.tensorboard and ranks.first else None
    rows, cosines = [], {}
    with Progress(_console(console, ranks), events) as progress:
        for seed in settings.seeds:
            for method in settings.methods:
                task = Task(method, seed)
                path = partial / _CHECKPOINTS / f"{task}.pt"
                state = train(settings, task, splits, path, progress, ranks)
                ranks.on_first(lambda: _save_weights(state, task, partial))  # noqa: B023
                rows += state.rows
                cosines[str(task)] = state.cosines
    return rows, cosines


def _console(console: Any, ranks: OneProcess) -> Any:
    """Where this rank says how it goes: nowhere unless it is the first."""
    make = require("rich.console", extra="train").Console
    if not ranks.first:
        return make(file=io.StringIO(), quiet=True)
    return console or make()


def _finish(rows: list[Row], cosines: Mapping[str, Any], partial: Path, out: Path) -> None:
    write_csv(rows, partial / "metrics.csv")
    write_json(partial / "cosines.json", cosines)
    write_report(partial)
    shutil.rmtree(partial / _CHECKPOINTS)
    os.rename(partial, out)


def _save_weights(state: State, task: Task, folder: Path) -> None:
    """The weights of the last epoch, and those of the selected head's epoch."""
    state.model.save(folder / f"{task}-last.safetensors")
    selected = DiverseViT(**state.model.config)
    selected.load_state_dict(state.best["weights"])
    selected.save(folder / f"{task}.safetensors")
