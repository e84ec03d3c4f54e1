"""The work of one process of a sweep: claim a cell, run or resume it, record it, and go on until none is left."""

import io
import json
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UnsupportedError, UsageError, require, usage_error
from ..files import FileError, path_exists
from ..models.pretrained import weights_file
from .config import Settings
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
    """Data sets, each prepared once in a process and handed out again.

    Args:
        prints: the fingerprints that they must have, by ``data_key``; what is not there is not checked.
        most: how many are kept.
    """

    def __init__(self, prints: Mapping[str, Any], most: int = 4):
        self._prints, self._most = prints, most
        self._kept: dict[str, Mapping[str, Any]] = {}

    def load(self, settings: Settings) -> Mapping[str, Any]:
        """Return the splits for ``settings``.

        Raises:
            UsageError: no such data, or others than the sweep began with.
        """
        key = data_key(settings)
        if key not in self._kept:
            splits = load(settings)
            if key in self._prints:
                found = {name: fingerprint(split) for name, split in splits.items()}
                if json.loads(json.dumps(found)) != self._prints[key]:
                    hint = "restore the data it started with, or start a new sweep"
                    raise usage_error("data", "what the sweep started with", "other data", hint)
            while len(self._kept) >= self._most:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = splits
        return self._kept[key]


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
    shelf = Shelf(sweep.record["splits"])
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
