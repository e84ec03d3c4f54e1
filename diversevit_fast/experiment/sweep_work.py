"""The work of one process of a sweep: claim a cell, run or resume it, record it, and go on until none is left."""

import hashlib
import io
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, UsageError, require, usage_error
from ..files import FileError, make_folder, path_exists
from ..models.pretrained import weights_file
from .config import Settings
from .prepared_data import read_splits, write_splits
from .run import fingerprint, load, resume, run
from .run_files import digest_of, out_of_memory
from .run_folder import BusyError
from .sweep_folder import SweepFolder
from .sweep_grid import Cell
from .sweep_results import Results

Say = Callable[[str], None]
MOST_DEATHS = 3
"""Processes that may die over a cell before it counts as failed."""


def data_key(settings: Settings) -> str:
    """Return what of the settings decides the data, as text."""
    said = {"data": settings.data, **settings.data_arguments(), "download": None}
    return json.dumps({k: v for k, v in said.items() if v is not None}, sort_keys=True)


class Shelf:
    """Data sets, each prepared once and handed out again.

    Args:
        prints: the fingerprints that they must have, by ``data_key``; what is not there is not checked.
        folder: where processes share what one of them prepared, in a file for each data set; None: nowhere.
        most: how many are kept.
    """

    def __init__(self, prints: Mapping[str, Any], folder: Path | None = None, most: int = 4):
        self._prints, self._folder, self._most = prints, folder, most
        self._kept: dict[str, Mapping[str, Any]] = {}

    def load(self, settings: Settings) -> Mapping[str, Any]:
        """Return the splits for ``settings``.

        Raises:
            UsageError: no such data, others than the sweep began with, or a damaged file of them.
            FileError: the file of them cannot be written or read.
        """
        key = data_key(settings)
        if key not in self._kept:
            path = None if self._folder is None else _file(self._folder, key)
            there = path is not None and path_exists(path)
            splits = read_splits(path) if path is not None and there else load(settings)
            if key in self._prints:
                found = {name: fingerprint(split) for name, split in splits.items()}
                if json.loads(json.dumps(found)) != self._prints[key]:
                    hint = "restore the data it started with, or start a new sweep"
                    raise usage_error("data", "what the sweep started with", "other data", hint)
            if path is not None and not there:
                splits = _shared(path, splits)
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = splits
        return self._kept[key]

    def share(self, folder: Path) -> None:
        """Write what is kept to ``folder``, for the processes of a sweep, and keep it no longer.

        Raises:
            FileError: it cannot be written.
        """
        for key, splits in self._kept.items():
            if not path_exists(path := _file(folder, key)):
                _shared(path, splits)
        self._kept.clear()


def _file(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"


def _shared(path: Path, splits: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write the splits, and return them as every process finds them: mapped from the file."""
    make_folder(path.parent)
    write_splits(path, splits)
    return read_splits(path)


def work(
    sweep: SweepFolder, say: Say, *, shard: tuple[int, int] = (1, 1), results: Results | None = None
) -> None:
    """Train cells of ``sweep`` until none of this ``shard`` is left that nobody else trains.

    Args:
        say: takes a line about each cell.
        shard: ``(k, n)`` takes the k-th of every n cells; the first is 1.

    Raises:
        FileError: the disk is full, or the like: no other cell would fare better.
        UsageError: the data, or the files of weights, are not those that the sweep began with.
        Interrupted: Ctrl-C; the cell is released, with the checkpoint of its last epoch.
    """
    _check_weights(sweep.record.get("weights", {}))
    shelf = Shelf(sweep.record["splits"], sweep.data)
    results = results or Results(sweep)
    index, count = shard
    mine = list(sweep.cells)[index - 1 :: count]
    busy: set[str] = set()
    while True:
        progress = sweep.progress()
        left = set(progress.left) - busy
        for name in (name for name in mine if name in left):
            cell, holder = sweep.cells[name], progress.gone.get(name)
            claim = sweep.claims.take(name, holder)
            if claim is not None:
                break
        else:
            return
        with claim:
            shelf.load(cell.settings)  # other data are no failure of the cell
            if not _open(sweep, cell):
                continue
            if claim.generation >= MOST_DEATHS:
                sweep.fail(cell, f"{claim.generation} processes died over it, the last: {holder}")
                say(f"{name}: failed")
                continue
            if _train(sweep, cell, shelf, say) == "busy":
                busy.add(name)
                continue
        results.update()


def _check_weights(digests: Mapping[str, str]) -> None:
    for named, digest in digests.items():
        if digest_of(weights_file(named)) != digest:
            hint = "restore the file it started with, or start a new sweep"
            wanted = f"{named} as the sweep started with it"
            raise usage_error("pretrained", wanted, "other weights", hint)


def _open(sweep: SweepFolder, cell: Cell) -> bool:
    """Return True if a cell that was just claimed is still to be trained."""
    failed = path_exists(sweep.path / "failed" / f"{cell.name}.json")
    return not failed and not path_exists(sweep.place(cell).out)


def _train(sweep: SweepFolder, cell: Cell, shelf: Shelf, say: Say) -> str:
    place, begun = sweep.place(cell), time.perf_counter()
    console = require("rich.console", extra="train").Console(file=io.StringIO(), quiet=True)
    try:
        if path_exists(place.partial):
            resume(place.partial, console=console, loader=shelf.load)
        else:
            run(cell.settings, place.out, console=console, loader=shelf.load)
    except BusyError:  # its process was thought dead, and is not
        return "busy"
    except FileError:
        raise
    except (UsageError, UnsupportedError) as failure:
        return _failed(sweep, cell, str(failure), "", say)
    except Exception as failure:
        if out_of_memory(failure):
            return _failed(sweep, cell, "memory: too little for it", "", say)
        reason = f"{type(failure).__name__}: {failure}"
        return _failed(sweep, cell, reason, traceback.format_exc(), say)
    say(f"{cell.name}: done in {time.perf_counter() - begun:.0f} s")
    return "done"


def _failed(sweep: SweepFolder, cell: Cell, reason: str, details: str, say: Say) -> str:
    if path_exists(sweep.place(cell).out):  # another process finished it meanwhile
        return "done"
    sweep.fail(cell, reason, details)
    say(f"{cell.name}: failed: {' '.join(reason.split())}")
    return "failed"
