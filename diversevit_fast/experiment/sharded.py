"""Checkpoints of several ranks: a folder that each rank writes its part of, and any number can read.

``<task>/epoch-000007/`` holds PyTorch's distributed checkpoint of weights and optimizer, and ``history.pt``.
It is written under another name and renamed when it is whole; then the one before is removed.
"""

import dataclasses
import enum
import io
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..errors import expected
from .config import Settings
from .distributed import OneProcess
from .files import write_atomically
from .state import State, Task, foreign, read

_HISTORY = "history.pt"
_UNFINISHED = ".partial"


def save(state: State, settings: Settings, task: Task, folder: Path, ranks: OneProcess) -> None:
    """Write the checkpoint into ``folder``; a crash leaves the previous one whole.

    Raises:
        UsageError: it could not be written, on any rank.
    """
    whole = folder / f"epoch-{state.epoch:06}"
    partial = whole.with_name(f"{whole.name}{_UNFINISHED}")
    ranks.on_first(lambda: _emptied(partial))
    try:
        with _unwarned():
            dcp.save(_tensors(state), checkpoint_id=partial, no_dist=not ranks.launched)
    except CheckpointException as failure:
        got = "; ".join(str(error[0]) for error in failure.failures.values())
        cure = "mend that, then resume"
        raise ranks.agreed(expected("checkpoint", f"a writable {folder}", got, cure)) from None
    history = state.history(settings, task)

    def finish() -> None:
        write_atomically(partial / _HISTORY, lambda file: torch.save(history, file))
        partial.rename(whole)
        for other in folder.iterdir():
            if other != whole:
                shutil.rmtree(other)

    ranks.on_first(finish)


def restore(state: State, settings: Settings, task: Task, folder: Path, ranks: OneProcess) -> None:
    """Continue from the last whole checkpoint in ``folder``, if there is one, whoever wrote it.

    Only tensors and plain values are unpickled.

    Raises:
        UsageError: it is damaged, or belongs to another run.
    """
    found = ranks.on_first(lambda: _epochs(folder))
    if not found:
        return
    last = found[-1]

    def check() -> None:
        state.accept(read(last / _HISTORY), settings, task, last)
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
    except (CheckpointException, KeyError, RuntimeError, ValueError) as failure:
        raise ranks.agreed(foreign(last, type(failure).__name__)) from None
    ranks.collect(state.trained, state.model)


def _tensors(state: State) -> dict[str, Any]:
    model, optimizer = get_state_dict(state.trained, state.optimizer)
    return {"model": model, "optimizer": optimizer}


def _emptied(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _epochs(folder: Path) -> list[Path]:
    """The whole checkpoints, the last one last."""
    found = folder.glob("epoch-*") if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix != _UNFINISHED)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class _PlainValues(dcp.DefaultLoadPlanner):
    """Reads numbers and strings of a checkpoint without unpickling anything else."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises where the planner's own would run something
        value.seek(0)
        super().load_bytes(read_item, value)


class _MetadataOnly(pickle.Unpickler):
    """Unpickles nothing but what PyTorch's index of a checkpoint is made of."""

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
    """Raise unless the index, which PyTorch unpickles whatever it holds, is an index."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            _MetadataOnly(file).load()
    except Exception as failure:  # on a damaged file the unpickler can raise anything
        raise foreign(path, type(failure).__name__) from None
