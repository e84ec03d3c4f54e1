"""The folder of a sweep: ``sweep.json``, and what became of each cell.

::

    sweep.json         the grid, fingerprints of the data, versions, a checksum
    cells/<name>/      a finished run of one method and one seed; <name>.partial while it is trained
    claims/            who trains what (``sweep_claims``)
    failed/<name>.json why a cell could not be trained
    data/              the prepared data, mapped by every process (``prepared_data``); until all cells are finished
    costs/             what their steps cost by prediction (``sweep_costs``)
    results.csv        of all finished cells (``sweep_results``)
    sweep.html, .png   what they show (``sweep_report``)

It appears whole, with its ``sweep.json``. Every process that works on it finds the same cells in the same order.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, usage_error
from ..files import list_names, make_folder, path_exists, sync_folder, writing
from .config import read_json
from .run_files import write_json
from .run_folder import Place
from .sweep_claims import STALE_AFTER, Claims, Holder
from .sweep_grid import Cell, Grid

FORMAT = 1
_FOLDERS = ("cells", "claims", "failed")


@dataclass(frozen=True)
class Progress:
    """What became of a sweep's cells, by name, at one moment.

    Attributes:
        done, failed, left: finished; with the reason; not begun, or begun by a process that is gone.
        running: with who trains it.
        gone: of ``left``, those that a process died over, with that process.
    """

    done: list[str]
    failed: dict[str, str]
    running: dict[str, Holder]
    left: list[str]
    gone: dict[str, Holder]


class SweepFolder:
    """A sweep's folder that exists.

    Attributes:
        path: of the folder.
        grid: what it trains.
        cells: by name, in the order of training.
        record: the content of ``sweep.json``.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], stale_after: float = STALE_AFTER):
        self.path, self.record = path, record
        self.grid = Grid.from_json(record["grid"])
        self.cells: dict[str, Cell] = {cell.name: cell for cell in self.grid.cells()}
        self.claims = Claims(path / "claims", stale_after)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], stale_after: float = STALE_AFTER
    ) -> "SweepFolder":
        """Open a sweep's folder.

        Raises:
            UsageError: it is none, or one of another format, or ``sweep.json`` was changed.
        """
        path = _path_of(folder)
        if not path_exists(path / "sweep.json"):
            got = f"{path}, which has no sweep.json" if path_exists(path) else f"no folder {path}"
            raise usage_error("resume", "the folder of a sweep", got, "check the path")
        record = read_json(path / "sweep.json", "resume")
        if record.get("format") != FORMAT:
            got = f"format {record.get('format')!r} in {path}"
            hint = "use the version that wrote it, or start a new sweep"
            raise usage_error("resume", f"a sweep of format {FORMAT}", got, hint)
        if record.get("sha256") != _digest(record):
            got = "one that does not fit its checksum: it was changed or damaged"
            wanted = f"{path / 'sweep.json'} as the sweep wrote it"
            raise usage_error("resume", wanted, got, "restore it, or start a new sweep")
        for name in _FOLDERS:
            make_folder(path / name)
        return cls(path, record, stale_after)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        grid: Grid,
        more: Mapping[str, Any],
        stale_after: float = STALE_AFTER,
    ) -> "SweepFolder":
        """Create the folder, or open one that holds the same grid.

        Raises:
            UsageError: something else is there, or the system refuses.
        """
        path = _path_of(folder)
        if path_exists(path):
            return cls._same(path, grid, stale_after)
        record = {"format": FORMAT, "grid": grid.to_json(), **more}
        record = json.loads(json.dumps(record))
        new = path.with_name(f".{secrets.token_hex(8)}.sweep")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.mkdir(new)
            try:
                for name in _FOLDERS:
                    os.mkdir(new / name)
                write_json(new / "sweep.json", {**record, "sha256": _digest(record)})
                os.rename(new, path)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                if path_exists(path):  # another process was faster
                    return cls._same(path, grid, stale_after)
                raise
            sync_folder(path.parent)
        return cls.open(path, stale_after)

    @classmethod
    def _same(cls, path: Path, grid: Grid, stale_after: float) -> "SweepFolder":
        if not path_exists(path / "sweep.json"):
            got = f"{path}, which is something else"
            raise usage_error("out", "a new folder, or a sweep's", got, "choose another --out")
        found = cls.open(path, stale_after)
        if found.grid != grid:
            hint = f"say --resume {path} for that one, or choose another --out"
            got = f"{path}, a sweep that differs in {_difference(found.grid, grid)}"
            raise usage_error("out", "a new folder, or the same sweep's", got, hint)
        return found

    @property
    def data(self) -> Path:
        """The folder of prepared data."""
        return self.path / "data"

    def place(self, cell: Cell) -> Place:
        """Return the paths of a cell's run."""
        return Place(self.path / "cells" / cell.name)

    def progress(self) -> Progress:
        """Look at every cell."""
        there, holders = set(list_names(self.path / "cells")), self.claims.holders()
        failures = set(list_names(self.path / "failed"))
        done, failed, running, left, gone = [], {}, {}, [], {}
        for name in self.cells:
            if name in there and f"{name}.partial" not in there:
                done.append(name)
            elif f"{name}.json" in failures:
                failed[name] = self._reason(name)
            elif name in holders and not holders[name].stale(self.claims.stale_after):
                running[name] = holders[name]
            else:
                left.append(name)
                if name in holders:
                    gone[name] = holders[name]
        return Progress(done, failed, running, left, gone)

    def fail(self, cell: Cell, reason: str, details: str = "") -> None:
        """Record why a cell cannot be trained."""
        said = {"cell": cell.name, "reason": " ".join(reason.split()), "time": time.time()}
        write_json(self.path / "failed" / f"{cell.name}.json", {**said, "details": details})

    def forgive(self) -> None:
        """Let failed cells be tried again."""
        for name in list_names(self.path / "failed"):
            if name.endswith(".json"):
                with writing(self.path / "failed" / name):
                    (self.path / "failed" / name).unlink(missing_ok=True)

    def _reason(self, name: str) -> str:
        try:
            return str(read_json(self.path / "failed" / f"{name}.json", "failed")["reason"])
        except (UsageError, KeyError):
            return "unknown"


def _path_of(folder: str | os.PathLike[str]) -> Path:
    path = Path(os.path.abspath(folder)) if str(folder) else Path()
    if not path.name or "\0" in str(folder):
        raise usage_error("out", "the name of a folder", repr(str(folder)), "name another")
    return path


def _difference(there: Grid, wanted: Grid) -> str:
    """Name what two grids differ in."""
    a, b = there.to_json(), wanted.to_json()
    names = [name for name in ("seeds", "pilot_seeds", "weights") if a.get(name) != b.get(name)]
    for part in ("fixed", "varied"):
        keys = {*a[part], *b[part]}
        names += sorted(key for key in keys if a[part].get(key) != b[part].get(key))
    return ", ".join(dict.fromkeys(names))


def _digest(record: Mapping[str, Any]) -> str:
    said = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
