"""The folder of a run: created under a lock, named ``.partial`` until it is complete, then renamed.

Everything a death can leave behind is one of: nothing, a partial folder to resume, a whole one that has
still to take its name, or a named one with a lock, or checkpoints, that nobody needs any more.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, usage_error
from ..files import (
    FileError,
    check_writable,
    is_leftover,
    make_folder,
    path_exists,
    reading,
    sync_folder,
    writing,
)
from .checkpoint import Task
from .config import read_json
from .run_files import write_json

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

_PARTIAL = ".partial"
_LOCK = ".lock"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)  # others: a file system that has no locks


class BusyError(UsageError):
    """Raised when another process works on the folder."""


@dataclass(frozen=True)
class Place:
    """Paths of a run: ``partial`` while it goes on, ``out`` when it is finished."""

    out: Path

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> "Place":
        """Return the paths of the run that is named by ``out`` or by ``partial``.

        Raises:
            UsageError: a path that no folder can have.
        """
        path = Path(folder)
        if path.name in ("", ".."):
            path = Path(os.path.abspath(path))
        name = path.name.removesuffix(_PARTIAL)
        if not name or "\0" in str(path):
            raise usage_error("out", "the name of a folder", repr(str(folder)), "name another")
        return cls(path.with_name(name))

    @property
    def partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}{_PARTIAL}")

    @property
    def checkpoints(self) -> Path:
        return self.partial / "checkpoints"

    @property
    def record(self) -> Path:
        return self.partial / "config.json"

    @property
    def finished(self) -> bool:
        """True if the run was finished: the report is the last file written."""
        return not path_exists(self.partial) and path_exists(self.out / "report.html")

    def whole(self, tasks: Iterable[Task]) -> bool:
        """True if ``partial`` holds all files of the finished run and only its final name is missing."""
        names = {"metrics.csv", "cosines.json", "report.html"}
        names |= {f"{task}{last}.safetensors" for task in tasks for last in ("", "-last")}
        return all(path_exists(self.partial / name) for name in names)


class Lock:
    """File lock of the one process that works on a run's folder; released when that process ends."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, folder: Path) -> None:
        """Acquire the lock of ``folder``.

        Raises:
            UsageError: another process holds it, or the folder has gone.
        """
        path = folder / _LOCK
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        with writing(path):
            self._descriptor = os.open(path, flags, 0o666)
        try:
            self._lock(folder)
            self._sign()
        except BaseException:
            self.release()
            raise
        held = os.fstat(self._descriptor)
        if not path.exists() or not os.path.samestat(held, path.stat()):
            self.release()
            got = f"{folder}, which another process has just finished"
            raise usage_error("resume", "an unfinished run", got, "open its report.html")

    def share(self, folder: Path) -> None:
        """Keep ``folder`` from being worked on, and write nothing into it.

        Raises:
            UsageError: another process works on it.
        """
        path = folder / _LOCK
        if path_exists(path):
            with reading(path):
                flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
                self._descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
            self._lock(folder, "continue", shared=True)

    def release(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _sign(self) -> None:
        """Write the holder's process id into the lock file, where possible."""
        with suppress(OSError):
            if self._descriptor is not None and os.fstat(self._descriptor).st_nlink == 1:
                os.ftruncate(self._descriptor, 0)  # not what is a file of somebody's as well
                os.write(self._descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())

    def _lock(self, folder: Path, argument: str = "resume", shared: bool = False) -> None:
        if fcntl is None or self._descriptor is None:
            return
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except OSError as failure:
            if failure.errno not in _BUSY:
                return
            holder = os.read(self._descriptor, 300).decode(errors="replace") or "another"
            got = f"{folder}, on which process {holder} is at work"
            busy = usage_error(argument, "a run that nobody works on", got, "wait for it")
            raise BusyError(str(busy)) from None


def check_new(place: Place) -> None:
    """Raise if something exists at either path.

    Raises:
        UsageError: something is there, or cannot be looked at.
    """
    for folder, hint in (
        (place.out, "choose another --out"),
        (place.partial, f"continue with --resume {place.out}, or choose another --out"),
    ):
        if path_exists(folder):
            raise usage_error("out", "a new folder", f"{folder}, which exists", hint)


def create(
    places: Iterable[Place],
    record: Mapping[str, Any],
    lock: Lock,
    fill: Callable[[Path], None] = lambda _: None,
) -> Place:
    """Create the partial folder of the first free one of ``places``, with its ``config.json``.

    It appears with all of that, and locked: nobody finds it half made.

    Args:
        fill: puts the first checkpoints into their folder.

    Raises:
        UsageError: none is free, or the system refuses.
    """
    taken: UsageError | None = None
    for place in places:
        try:
            check_new(place)
            _create(place, record, lock, fill)
        except FileError:
            raise
        except UsageError as failure:
            taken = failure
        else:
            return place
    raise taken or usage_error("out", "a folder", "none", "name one")


def _create(
    place: Place, record: Mapping[str, Any], lock: Lock, fill: Callable[[Path], None]
) -> None:
    new = place.partial.with_name(f".{secrets.token_hex(8)}{_PARTIAL}")
    with writing(place.partial):
        place.partial.parent.mkdir(parents=True, exist_ok=True)
        os.mkdir(new)
        try:
            lock.take(new)
            write_record(new / place.record.name, record)
            os.mkdir(new / place.checkpoints.name)
            fill(new / place.checkpoints.name)
            os.rename(new, place.partial)
        except BaseException as failure:
            lock.release()
            shutil.rmtree(new, ignore_errors=True)
            if isinstance(failure, OSError) and failure.errno in _TAKEN:
                check_new(place)
            raise
        sync_folder(place.partial.parent)


def give_name(place: Place, keep: bool) -> None:
    """Rename the complete folder to its final name, then remove what a finished run does not need.

    Args:
        keep: whether its checkpoints stay.

    Raises:
        UsageError: the system refuses, say because there is an ``out`` already.
    """
    sweep(place.partial)
    try:
        os.rename(place.partial, place.out)
    except OSError as failure:
        wanted = f"a free name {place.out} for the finished run in {place.partial}"
        hint = f"mend that, then: diversevit run --resume {place.partial}"
        raise usage_error("out", wanted, failure.strerror, hint) from None
    with suppress(FileError, OSError):
        sync_folder(place.out.parent)
    tidy(place, keep)


def tidy(place: Place, keep: bool | None = None) -> None:
    """Remove what a finished run does not need; failures are left for the next time.

    Args:
        keep: whether its checkpoints stay; None: as its ``config.json`` says.
    """
    if not (keeps_checkpoints(place.out) if keep is None else keep):
        shutil.rmtree(place.out / place.checkpoints.name, ignore_errors=True)
    sweep(place.out)
    with suppress(OSError):
        (place.out / _LOCK).unlink()


def untidy(place: Place) -> bool:
    """Return True if ``tidy`` has something to do."""
    if path_exists(place.out / _LOCK):
        return True
    return path_exists(place.out / place.checkpoints.name) and not keeps_checkpoints(place.out)


def keeps_checkpoints(folder: Path) -> bool:
    """Return False if the finished run in ``folder`` says that it keeps none; else nothing there is removed."""
    settings = read_json(folder / "config.json", "config.json").get("settings")
    return not (isinstance(settings, dict) and settings.get("keep_checkpoints") is False)


def prepare(place: Place) -> None:
    """Prepare an unfinished folder for resuming: make its checkpoint folder, remove half-written files.

    Raises:
        FileError: the system refuses to write there, or somebody put a link there.
    """
    sweep(place.partial)
    make_folder(place.checkpoints)
    sweep(place.checkpoints)
    for folder in (place.partial, place.checkpoints):
        check_writable(folder)  # before an epoch is spent


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed process left in ``folder``."""
    with suppress(OSError):
        for path in folder.iterdir():
            if is_leftover(path):
                with suppress(OSError):
                    path.unlink()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write ``config.json`` with a checksum of all else that it says."""
    write_json(path, {**record, "sha256": _digest(record)})


def check_record(path: Path, record: Mapping[str, Any], argument: str = "resume") -> None:
    """Raise if ``config.json`` is not as it was written; files of older versions have no checksum.

    Raises:
        UsageError: it was changed or damaged.
    """
    if record.get("sha256", _digest(record)) != _digest(record):
        got = "one that does not fit its checksum: it was changed or damaged"
        wanted = f"{path} as the run wrote it"
        raise usage_error(argument, wanted, got, "restore it, or start a new run")


def _digest(record: Mapping[str, Any]) -> str:
    said = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
