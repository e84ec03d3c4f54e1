"""Claims: which process trains which cell of a sweep, where several processes and machines share its folder.

A claim is a file ``<cell>.<generation>``, made only where there is none (``O_EXCL``), with host and process id in it;
a thread touches it every few seconds. One whose process is dead, or which nobody touched for long, is stale: the cell
is taken over by making the file of the next generation, which again only one process can do. No claim is renamed or
written over, so a claim that was renewed meanwhile is never lost.
"""

import json
import os
import secrets
import socket
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import list_names, make_folder, writing

HEARTBEAT = 15.0
"""Seconds between two touches of a claim."""
STALE_AFTER = 10.0
"""Minutes without a touch after which a claim is stale, wherever it was made."""


@dataclass(frozen=True)
class Holder:
    """Who holds, or held, a cell.

    Attributes:
        generation: how many processes had the cell before.
        host, pid: of its process, for the reader.
        machine: what tells its processes' ids apart from those of other machines and containers.
        born: when the process began, in the system's own count: a process id can be used again.
        token: no two claims have the same.
        age: seconds since the claim was touched.
        since: seconds since it was made.
    """

    generation: int
    host: str
    pid: int
    machine: str
    born: str
    token: str
    age: float
    since: float

    def stale(self, after: float = STALE_AFTER) -> bool:
        """Return True if the process is dead, or silent for more than ``after`` minutes."""
        if self.age > 60 * after:
            return True
        return self.machine == _machine() and _born(self.pid) != self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Claim:
    """A cell that this process holds; a context manager that touches the claim, and releases it at the end."""

    def __init__(self, folder: Path, cell: str, generation: int):
        self._folder, self._cell, self.generation = folder, cell, generation
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Claim":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for generation in range(self.generation + 1):  # its own last: until then it is held
            with suppress(OSError):
                (self._folder / f"{self._cell}.{generation}").unlink()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(self._folder / f"{self._cell}.{self.generation}")


class Claims:
    """The claims of a sweep, in a folder.

    Args:
        stale_after: minutes, see ``Holder.stale``.
    """

    def __init__(self, folder: Path, stale_after: float = STALE_AFTER):
        self.folder, self.stale_after = folder, stale_after

    def holders(self) -> dict[str, Holder]:
        """Return the last holder of each cell that has one, dead or alive."""
        last: dict[str, int] = {}
        for name in list_names(self.folder):
            cell, _, generation = name.rpartition(".")
            if cell and generation.isdecimal():
                last[cell] = max(last.get(cell, 0), int(generation))
        if not last:
            return {}
        now = self._now()
        found = {cell: self._read(cell, generation, now) for cell, generation in last.items()}
        return {cell: holder for cell, holder in found.items() if holder is not None}

    def take(self, cell: str, holder: Holder | None) -> Claim | None:
        """Claim a cell whose last holder, as read just now, was ``holder``; None if another process was faster.

        Raises:
            FileError: the system refuses to write.
        """
        generation = 0
        if holder is not None:
            if not holder.stale(self.stale_after):
                return None
            generation = holder.generation + 1
        path = self.folder / f"{cell}.{generation}"
        said = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}
        said |= {"born": _born(os.getpid()), "token": secrets.token_hex(8), "made": time.time()}
        with writing(path):
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            except FileExistsError:
                return None
            try:
                os.write(descriptor, json.dumps(said).encode())
            except OSError:
                path.unlink()
                raise
            finally:
                os.close(descriptor)
        if holder is not None:
            before = self._read(cell, holder.generation, self._now())
            if before is None or before.token != holder.token:  # released and taken anew meanwhile
                with suppress(OSError):
                    path.unlink()
                return None
        return Claim(self.folder, cell, generation)

    def _read(self, cell: str, generation: int, now: float) -> Holder | None:
        path = self.folder / f"{cell}.{generation}"
        try:
            stat, text = path.stat(), path.read_bytes()
        except OSError:  # it has just been released
            return None
        try:
            said: Any = json.loads(text)
            made = float(said["made"])
            words = [str(said[name]) for name in ("host", "machine", "born", "token")]
            pid = int(said["pid"])
        except (ValueError, TypeError, KeyError):  # being written, or cut off by a full disk
            made, words, pid = stat.st_mtime, ["an unknown host", "", "", ""], 0
        host, machine, born, token = words
        age = max(0.0, now - stat.st_mtime)
        return Holder(
            generation, host, pid, machine, born, token, age, max(0.0, time.time() - made)
        )

    def _now(self) -> float:
        """Return the time by the clock that dates the claims: a shared folder's may differ from ours."""
        make_folder(self.folder)
        with writing(self.folder), tempfile.NamedTemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_mtime


def _machine() -> str:
    """Return what the processes share that have different process ids: a boot of a machine, a container in it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _born(pid: int) -> str:
    """Return when a process of this machine began; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        try:  # a system without /proc: at least whether it lives
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
        return "?"
    return "" if fields[0] in "ZX" else fields[19]
