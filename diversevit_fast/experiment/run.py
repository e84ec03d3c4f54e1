"""Run or resume an experiment: every method on every seed, in a folder named ``.partial`` until finished.

While it runs everything lies in ``<out>.partial``; the folder takes its name at the end. A killed
run loses at most the current epoch: ``resume`` goes on from the last checkpoint, to the same end.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ..data import load_splits
from ..errors import UsageError, require, usage_error
from ..files import FileError, path_exists
from ..models import DiverseViT
from . import run_folder
from .checkpoint import State, Task
from .config import MOST_THREADS, Settings, read_json
from .distributed import OneProcess, noticing_lost_ranks, open_ranks, resume_command
from .machine import changes, check_model, check_threads, describe_machine, versions
from .metrics import Row, write_csv
from .plots import rehearse
from .progress import Progress
from .report import write_report
from .run_files import out_of_memory, write_json
from .run_folder import Lock, Place
from .terminal import steady_console
from .train import head_diversity, train


class Interrupted(KeyboardInterrupt):
    """Raised on Ctrl-C during a run; ``folder`` can be resumed."""

    def __init__(self, folder: Path, command: str):
        super().__init__(f"interrupted; continue with: {command}")
        self.folder = folder


def run(settings: Settings, out: str | Path | None = None, *, console: Any = None) -> Path:
    """Train, evaluate, select heads, report; everything lands in the new folder ``out``.

    Under ``torchrun`` all ranks call this and train together; rank 0's ``out`` counts, and it alone
    writes there but for the checkpoints.

    Args:
        settings: see ``resolve``.
        out: a folder that does not exist yet; on several machines one that they share. If None, one
            below ``runs`` that no other run has, however many start at once.
        console: a rich console; a new one on standard output if None. Only rank 0 uses it, and no
            error of it stops the run.

    Returns:
        The folder: ``report.html``, ``metrics.csv``, ``config.json``, plots and weights.

    Raises:
        UsageError: the folder exists, the data are missing, the loss diverged, the disk is full, ...
        Interrupted: Ctrl-C.
    """
    if settings.source is not None:  # the run may be resumed from elsewhere
        settings = dataclasses.replace(settings, source=os.path.abspath(settings.source))
    with open_ranks(settings.device, fsdp=settings.fsdp) as ranks, Lock() as lock:
        wanted = ranks.on_first(lambda: None if out is None else _new_place(out))
        splits, prints = _prepare(settings, ranks, settings.threads)
        record = {
            "settings": settings.to_json(),
            "splits": prints,
            "versions": versions(),
            "machine": describe_machine(),
            "threads": settings.threads or torch.get_num_threads(),
            **({"ranks": [ranks.count]} if ranks.launched else {}),
        }
        places = [wanted] if wanted else _default_places(settings)
        place = ranks.on_first(lambda: run_folder.create(places, record, lock))
        return _continue(settings, splits, record, place, console, ranks)


def resume(folder: str | Path, *, console: Any = None) -> Path:
    """Finish a run that was killed or interrupted; on a CPU bit for bit as if it had not been.

    What several ranks left unfinished can be finished by another number of ranks, or by one process,
    to the same end but for rounding (and for what ``fraction`` draws). Other versions of the packages
    than it began with are said in a line.

    Args:
        folder: the run's ``out``, with or without ``.partial``.

    Raises:
        UsageError: nothing to resume, another process is at it, or a checkpoint, the configuration or
            the data do not fit or cannot be read.
        Interrupted: Ctrl-C.
    """
    place = Place.of(folder)
    if place.finished and run_folder.untidy(place):  # the process died after it gave the name
        run_folder.tidy(place)
        return place.out
    record = _read_record(place)
    settings = Settings.from_json(record["settings"])
    with open_ranks(settings.device) as ranks, Lock() as lock:
        ranks.on_first(lambda: lock.take(place.partial))
        if ranks.on_first(lambda: place.whole(_tasks(settings))):
            ranks.on_first(lambda: run_folder.give_name(place))
            return place.out
        splits, prints = _prepare(settings, ranks, record["threads"])
        if record.get("splits") != prints:
            hint = "restore the data it started with, or start a new run"
            got = usage_error(
                "data", f"the data that {place.partial} started with", "other data", hint
            )
            raise ranks.agreed(got)
        ranks.together(lambda: run_folder.check_record(place, record))
        notes = _note_changes(record, ranks)
        if notes:
            ranks.on_first(lambda: run_folder.write_record(place.record, record))
        return _continue(settings, splits, record, place, console, ranks, notes)


def _new_place(out: str | Path) -> Place:
    place = Place.of(out)
    if place.out != Path(out) and Path(out).name == place.partial.name:
        hint = f"say --resume {out} to go on with a run, or choose another --out"
        raise usage_error("out", "a name that does not end as an unfinished run's does", out, hint)
    run_folder.check_new(place)
    return place


def _default_places(settings: Settings) -> Iterator[Place]:
    """Yield ``runs/<data>-<date>``, then the names to try if another run has it."""
    name = f"{settings.data}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in count(1):
        yield Place(Path("runs") / (name if number == 1 else f"{name}-{number}"))


def _tasks(settings: Settings) -> list[Task]:
    """Return every training of a run, in order."""
    return [Task(method, seed) for seed in settings.seeds for method in settings.methods]


def _read_record(place: Place) -> dict[str, Any]:
    """Read ``config.json`` of an unfinished run."""
    if not path_exists(place.partial):
        got = f"{place.out}, which is finished" if place.finished else f"no folder {place.partial}"
        hint = "check the path, or start a run with --out"
        raise usage_error(
            "resume", "an unfinished run", got, "open its report.html" if place.finished else hint
        )
    if path_exists(place.out):
        raise usage_error(
            "resume", f"no finished folder {place.out}", "one that exists", "move it away first"
        )
    record = read_json(place.record, "resume")
    ranks = record.get("ranks", [1])
    for name, fits in (
        ("settings", isinstance(record.get("settings"), dict)),
        ("threads", type(record.get("threads")) is int and 0 < record["threads"] <= MOST_THREADS),
        (
            "ranks",
            isinstance(ranks, list) and ranks and all(type(n) is int and n > 0 for n in ranks),
        ),
        ("versions", isinstance(record.get("versions"), dict)),
        ("resumed_with", isinstance(record.get("resumed_with", {}), dict)),
        ("machine", isinstance(record.get("machine"), dict)),
    ):
        if not fits:
            got = f"{place.record} without {name}"
            raise usage_error("resume", "the configuration of a run", got, "start a new run")
    return record


def _note_changes(record: dict[str, Any], ranks: OneProcess) -> list[str]:
    """Record in ``record`` what changed since the run began; return the lines that say so."""
    counts, notes = record.get("ranks", [1]), []
    if counts[-1] != ranks.count:
        record["ranks"] = [*counts, ranks.count]
        notes.append(f"resumed by {ranks.count} instead of {counts[-1]} ranks")
    known = _platform(record["versions"], record["machine"]) | record.get("resumed_with", {})
    now = _platform(versions(), describe_machine())
    new = {name: version for name, version in now.items() if known.get(name) != version}
    if new:
        record["resumed_with"] = record.get("resumed_with", {}) | new
        notes.append(changes("resumed with", known, new))
    return notes


def _platform(versions: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by name, what rounding depends on."""
    return {**versions, **{name: machine.get(name) for name in ("processor", "gpu")}}


def _prepare(
    settings: Settings, ranks: OneProcess, threads: int | None
) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
    """Load the data, the same on every rank, with fingerprints; refuse what cannot be trained."""
    ranks.together(lambda: check_model(settings, ranks.device))
    if settings.download:
        ranks.on_first(lambda: _load(settings) and None)  # one fetches, the others find the files

    def prepare() -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
        _require_extras(settings)
        check_threads(threads or 1)
        splits = _load(settings)
        check_model(settings, ranks.device, len(splits["train"].labels))
        rehearsal = State.fresh(settings, Task("diversevit", 0), splits["train"], ranks.device)
        head_diversity(settings, rehearsal.model)
        return splits, {name: fingerprint(dataset) for name, dataset in splits.items()}

    splits, prints = ranks.together(prepare)
    if any(other != prints for other in ranks.gathered(prints)):
        hint = "give every machine the same files"
        raise ranks.agreed(usage_error("data", "the same on every rank", "different ones", hint))
    return splits, prints


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Return the number of samples of a split, per group, and a digest of all of it."""
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
    """Raise if a package for the report is missing, before training rather than after it."""
    wanted = ["jinja2", "safetensors", "rich"]
    for module in wanted + ["tensorboard"] * settings.tensorboard:
        require(module, extra="train")
    rehearse()


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
    place: Place,
    console: Any,
    ranks: OneProcess,
    notes: Sequence[str] = (),
) -> Path:
    """Train what is not trained yet, write the artefacts, give the folder its name."""
    before = torch.get_num_threads()
    torch.set_num_threads(record["threads"])
    command = resume_command(place.partial, ranks)
    try:
        ranks.on_first(lambda: run_folder.prepare(place))
        with noticing_lost_ranks(ranks, f"continue with: {command}"):
            rows, cosines = _train_all(settings, splits, place, console, ranks, notes)
            ranks.on_first(lambda: _finish(rows, cosines, place, command))
    except KeyboardInterrupt:
        raise Interrupted(place.partial, command) from None
    except FileError as failure:
        raise FileError(f"{failure}, then continue with: {command}") from None
    except (MemoryError, RuntimeError) as failure:
        if not out_of_memory(failure):
            raise
        hint = f"free some, then continue with: {command}"
        raise usage_error("memory", "enough for this run", "too little", hint) from None
    finally:
        torch.set_num_threads(before)
    return place.out


def _train_all(
    settings: Settings,
    splits: Mapping[str, Any],
    place: Place,
    console: Any,
    ranks: OneProcess,
    notes: Sequence[str],
) -> tuple[list[Row], dict[str, Any]]:
    """Train every method on every seed; return the rows of ``metrics.csv`` and ``cosines.json``."""
    events = place.partial / "tensorboard" if settings.tensorboard and ranks.first else None
    rows, cosines = [], {}
    with steady_console(_console(console, ranks)) as steady, Progress(steady, events) as progress:
        for note in notes:
            progress.noted(note)
        for task in _tasks(settings):
            path = place.checkpoints / f"{task}.pt"
            state = train(settings, task, splits, path, progress, ranks)
            ranks.on_first(lambda: _save_weights(state, task, place.partial))  # noqa: B023
            rows += state.rows
            cosines[str(task)] = state.cosines
    return rows, cosines


def _console(console: Any, ranks: OneProcess) -> Any:
    """Return the console of this rank; ranks other than the first print nothing."""
    make = require("rich.console", extra="train").Console
    if not ranks.first:
        return make(file=io.StringIO(), quiet=True)
    return console or make()


def _finish(rows: list[Row], cosines: Mapping[str, Any], place: Place, command: str) -> None:
    write_csv(rows, place.partial / "metrics.csv")
    write_json(place.partial / "cosines.json", cosines)
    try:
        write_report(place.partial)
    except FileError:
        raise
    except UsageError as failure:
        kept = f"everything is trained and kept, continue with: {command}"
        raise usage_error("report", "one of this run", f"an error ({failure})", kept) from None
    run_folder.give_name(place)


def _save_weights(state: State, task: Task, folder: Path) -> None:
    """Save the weights of the last epoch and of the selected head's epoch."""
    state.model.save(folder / f"{task}-last.safetensors")
    selected = DiverseViT(**state.model.config)
    selected.load_state_dict(state.best["weights"])
    selected.save(folder / f"{task}.safetensors")
