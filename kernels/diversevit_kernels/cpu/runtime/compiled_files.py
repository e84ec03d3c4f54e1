"""What the CPU backend compiles and keeps on disk: how a file is named, checked, written, and loaded.

Folder       ``private_folder``. A file's name tells what it is, and a digest of all it was made from and of the
             processor; its last bytes are a digest of the others and of the name. A file that does not agree with
             it (cut short, damaged, another's) or does not load is compiled again, once in a process.
Loading      exactly the bytes that were checked, out of memory where the system allows it: what happens to the file
             afterwards changes nothing.
Environment  ``DIVERSEVIT_COMPILE=0`` (``environment``) compiles and loads nothing.
"""

import hashlib
import itertools
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch

from ...common.environment import switch
from . import private_folder

Loaded = TypeVar("Loaded")

_DIGEST = hashlib.sha256().digest_size
_BEGUN = "building-"
_ABANDONED = 24 * 3600.0
"""Seconds after which what a killed process had begun is cleared away."""
_warned = False
_numbers = itertools.count(1)


def allowed() -> bool:
    """Whether anything may be compiled or loaded."""
    return switch("DIVERSEVIT_COMPILE", default=True)


def name_of(name: str, *made_from: str) -> str:
    """The name of the file of a library that is made from these, on this processor."""
    processor = (platform.machine(), _capabilities(), _flags())
    digest = hashlib.sha256("\n".join((*made_from, *processor)).encode()).hexdigest()[:16]
    return f"{name}_{digest}.so"


def loaded(file: str, build: Callable[[Path], Path], load: Callable[[str], Loaded]) -> Loaded:
    """What ``load`` makes of a library's path: of the file kept under that name, else of a new one.

    Args:
        build: compiles into the folder that it is given, and returns the library's path.

    Raises:
        OSError: it cannot be compiled, kept or loaded.
    """
    folder = private_folder.folder()
    kept = _checked(file, private_folder.read(folder / file))
    if kept is not None:
        with suppress(OSError, RuntimeError):  # of another machine, or system: as good as damaged
            return _loaded(kept, load, folder)
    with _scratch(folder) as aside:
        made = build(aside).read_bytes()
        private_folder.write_whole(folder / file, made + _digest(file, made), aside)
    return _loaded(made, load, folder)


def _checked(file: str, content: bytes | None) -> bytes | None:
    """The library in a file's content, if that is whole."""
    if content is None or len(content) <= _DIGEST:
        return None
    library = content[:-_DIGEST]
    return library if content[-_DIGEST:] == _digest(file, library) else None


def _digest(file: str, library: bytes) -> bytes:
    return hashlib.sha256(file.encode() + b"\0" + library).digest()


def _loaded(library: bytes, load: Callable[[str], Loaded], folder: Path) -> Loaded:
    # a system may have no such memory, or run nothing that lies there
    with suppress(OSError, RuntimeError, AttributeError), _in_memory(library) as path:
        return load(path)
    with _scratch(folder) as aside:
        path = aside / "library.so"
        path.write_bytes(library)
        return load(str(path))


@contextmanager
def _in_memory(library: bytes) -> Iterator[str]:
    """A path of memory that holds ``library``; each time another one, for what is loaded is known by its path."""
    with open(os.memfd_create("diversevit"), "wb") as file:
        file.write(library)
        file.flush()
        yield f"/proc/self/fd/{'./' * next(_numbers)}{file.fileno()}"


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A new folder in ``folder`` for the time of the block; what other processes left behind is cleared away."""
    for left in folder.glob(f"{_BEGUN}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _ABANDONED:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(
        prefix=_BEGUN, dir=folder, ignore_cleanup_errors=True
    ) as aside:
        yield Path(aside)


def _capabilities() -> str:
    """What PyTorch says of the processor: a list, before 2.11 one word."""
    listed = getattr(torch.cpu, "get_capabilities", None)
    return str(sorted(listed().items())) if listed else torch.backends.cpu.get_cpu_capability()


def _flags() -> str:
    """What the system says of the first processor: compilers use more than PyTorch asks about."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = itertools.takewhile(str.strip, file)
        kinds = ("flags", "features", "model", "cpu ", "isa")
        return "".join(
            line for line in first if line.lower().startswith(kinds) and "MHz" not in line
        )
    return ""


def warn_once(name: str, error: Exception) -> None:
    """Say that ``name`` could not be compiled, if it is the first."""
    global _warned
    if not _warned:
        _warned = True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"diversevit: {name} could not be compiled ({reason[:300]}); "
            "running the slower path (DIVERSEVIT_COMPILE=0 stops trying)",
            stacklevel=3,
        )
