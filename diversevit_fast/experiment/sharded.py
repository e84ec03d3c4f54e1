"""Checkpoints of several ranks: each rank writes its part, any number of ranks can read them.

``<task>/epoch-000007/`` holds PyTorch's distributed checkpoint of weights and optimizer, and ``history.pt``,
with the checksums of all of it. It is written under a name that nobody can guess and renamed when it is
whole; then the one before is removed.
"""

import dataclasses
import enum
import io
import os
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..errors import UsageError
from ..files import list_names, make_folder, open_plain, path_exists, reading, sync_folder, writing
from .checkpoint import State, Task, foreign, read, write_content
from .config import Settings
from .distributed import OneProcess
from .run_files import digest_of

_HISTORY = "history.pt"
_WHOLE = "it with its folder"


def save(state: State, settings: Settings, task: Task, folder: Path, ranks: OneProcess) -> None:
    """Write the checkpoint into ``folder``; a crash leaves the previous one whole.

    Raises:
        UsageError: it could not be written, on any rank.
    """
    whole = folder / f"epoch-{state.epoch:06}"
    partial = ranks.on_first(lambda: _new_folder(folder))
    try:
        with _unwarned():
            dcp.save(_tensors(state), checkpoint_id=partial, no_dist=not ranks.launched)
    except CheckpointException as failure:
        ranks.on_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise ranks.agreed(_refused(failure, partial, writing)) from None
    ranks.on_first(lambda: _finish(partial, whole, state.history(settings, task)))


def _new_folder(folder: Path) -> Path:
    make_folder(folder)
    partial = folder / f".{secrets.token_hex(8)}.partial"
    with writing(partial):
        partial.mkdir()
    return partial


def _finish(partial: Path, whole: Path, history: dict[str, Any]) -> None:
    """Add checksums and history, then let the checkpoint replace the one before."""
    files = {path.name: digest_of(path) for path in sorted(partial.iterdir())}
    write_content(partial / _HISTORY, {**history, "files": files})
    with writing(whole):
        if whole.exists():  # damaged, and resumed from the one before
            shutil.rmtree(whole)
        os.rename(partial, whole)
        sync_folder(whole.parent)
    for other in whole.parent.iterdir():
        if other != whole:
            shutil.rmtree(other, ignore_errors=True)  # else with the next one


def restore(
    state: State,
    settings: Settings,
    task: Task,
    folder: Path,
    ranks: OneProcess,
    note: Callable[[str], object],
) -> None:
    """Restore the last complete checkpoint in ``folder``, if there is one, from any number of ranks.

    Only tensors and plain values are unpickled. ``note`` is told where there were no checksums to check.

    Raises:
        UsageError: it cannot be read, is damaged, or belongs to another run.
    """
    found = ranks.on_first(lambda: _epochs(folder))
    if not found:
        return
    last = found[-1]

    def check() -> None:
        _check_there(last / _HISTORY)
        history = read(last / _HISTORY, _WHOLE)
        state.accept(history, settings, task, last)
        if "files" in history:
            _check_files(last, history["files"], ranks)
        else:
            note(f"{last} is of an older version, without checksums: damage would not be noticed")
        _check_metadata(last)

    ranks.together(check)
    tensors = _tensors(state)
    try:
        with _unwarned():
            dcp.load(
                tensors, checkpoint_id=last, planner=_PlainValues(), no_dist=not ranks.launched
            )
        set_state_dict(
            state.trained,
            state.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
    except CheckpointException as failure:
        raise ranks.agreed(_refused(failure, last, reading)) from None
    except (KeyError, RuntimeError, ValueError) as failure:
        raise ranks.agreed(foreign(last, type(failure).__name__)) from None
    ranks.collect(state.trained, state.model)


def last_history(folder: Path) -> Any:
    """Return the ``history`` of the last complete checkpoint in ``folder``; None if there is none.

    Raises:
        UsageError: it cannot be read, or is damaged.
    """
    found = _epochs(folder)
    return read(found[-1] / _HISTORY, _WHOLE) if found else None


def _tensors(state: State) -> dict[str, Any]:
    model, optimizer = get_state_dict(state.trained, state.optimizer)
    return {"model": model, "optimizer": optimizer}


def _check_files(folder: Path, files: dict[str, str], ranks: OneProcess) -> None:
    """Check this rank's share of the files against their checksums."""
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files):
        raise _foreign(folder / _HISTORY, "one that does not fit")
    for name in sorted(files)[ranks.rank :: ranks.count]:
        path = folder / name
        _check_there(path)
        if digest_of(path) != files[name]:
            raise _foreign(path, "a damaged one, which does not fit its checksum")


def _foreign(path: Path, got: str) -> UsageError:
    return foreign(path, got, _WHOLE)


def _check_there(path: Path) -> None:
    if not path_exists(path):
        raise _foreign(path, "nothing there")


def _refused(failure: CheckpointException, folder: Path, doing: Any) -> UsageError:
    """Return the operating system's error, or else the error for a damaged checkpoint.

    Raises:
        KeyboardInterrupt: it was that.
    """
    causes = [error[0] for error in failure.failures.values()]
    for cause in causes:
        if not isinstance(cause, Exception):
            raise cause  # Ctrl-C
    try:
        with doing(folder):
            for cause in causes:
                if isinstance(cause, (OSError, MemoryError)):
                    raise cause
    except UsageError as said:
        return said
    kinds = ", ".join(sorted({type(cause).__name__ for cause in causes}))
    return foreign(folder, kinds)


def _epochs(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    names = list_names(folder) if path_exists(folder) else ()
    return [folder / name for name in names if re.fullmatch(r"epoch-\d+", name)]


@contextmanager
def _unwarned() -> Iterator[None]:
    """Context manager: silence PyTorch's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class _PlainValues(dcp.DefaultLoadPlanner):
    """Loader that reads numbers and strings of a checkpoint and unpickles nothing else."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises where the planner's own would run something
        value.seek(0)
        super().load_bytes(read_item, value)


class _MetadataOnly(pickle.Unpickler):
    """Unpickler limited to the classes of PyTorch's checkpoint index."""

    def find_class(self, module: str, name: str) -> Any:
        if not module.startswith(("torch", "pathlib")):  # nothing else is even imported
            raise pickle.UnpicklingError(module)
        found = super().find_class(module, name)
        described = module.startswith("torch.distributed.checkpoint.") and isinstance(found, type)
        if (
            (described and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)))
            or (isinstance(found, type) and issubclass(found, PurePath))
            or isinstance(found, torch.dtype)
            or found is torch.Size
            or (module, name) == ("torch.serialization", "_get_layout")
        ):
            return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def _check_metadata(folder: Path) -> None:
    """Raise unless the index file holds only an index; PyTorch would unpickle anything in it."""
    path = folder / ".metadata"
    try:
        with reading(path), open_plain(path) as file:
            _MetadataOnly(file).load()
    except UsageError:
        raise
    except Exception as failure:  # on a damaged file the unpickler can raise anything
        raise _foreign(path, type(failure).__name__) from None
