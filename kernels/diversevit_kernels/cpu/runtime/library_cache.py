"""On-disk cache of compiled libraries: how a file is named, verified, written and loaded.

Folder       ``cache_folder``. A file is named after its content and a digest of everything it was compiled from,
             processor included. Its last bytes are a digest of the rest and of the name; a file that does not match
             it (truncated, damaged, another one renamed) or that does not load is compiled again, once per process.
Loading      from memory where the system allows it, so that exactly the verified bytes are loaded, whatever happens
             to the file meanwhile.
Environment  ``DIVERSEVIT_COMPILE=0`` (``environment``): nothing is compiled or loaded.
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
from . import cache_folder

Loaded = TypeVar("Loaded")

_DIGEST_BYTES = hashlib.sha256().digest_size
_BUILD_PREFIX = "building-"
_MAX_BUILD_SECONDS = 24 * 3600.0
"""Build folders older than this were left by killed processes and are deleted."""
_warned = False
_numbers = itertools.count(1)


def enabled() -> bool:
    """Return whether ``DIVERSEVIT_COMPILE`` lets anything be compiled or loaded."""
    return switch("DIVERSEVIT_COMPILE", default=True)


def file_name(name: str, *made_from: str) -> str:
    """Return the file name of a library compiled from ``made_from`` (sources, flags ...) on this processor."""
    processor = (platform.machine(), _capabilities(), _processor_features())
    digest = hashlib.sha256("\n".join((*made_from, *processor)).encode()).hexdigest()[:16]
    return f"{name}_{digest}.so"


def load_or_build(
    file: str, build: Callable[[Path], Path], load: Callable[[str], Loaded]
) -> Loaded:
    """Load the library cached as ``file``; build and cache it first if there is none, or an unusable one.

    Args:
        file: a name from ``file_name``.
        build: compiles into the folder it is given and returns the library's path.
        load: loads the library at a path; its result is returned.

    Raises:
        OSError: it cannot be compiled, written or loaded.
    """
    folder = cache_folder.folder()
    cached = _verified(file, cache_folder.read(folder / file))
    if cached is not None:
        with suppress(OSError, RuntimeError):  # compiled for another system: build it again
            return _load(cached, load, folder)
    with _build_folder(folder) as temporary:
        made = build(temporary).read_bytes()
        cache_folder.write_whole(folder / file, made + _digest(file, made), temporary)
    return _load(made, load, folder)


def _verified(file: str, content: bytes | None) -> bytes | None:
    """Return the library in a file's content, or None if the digest does not match."""
    if content is None or len(content) <= _DIGEST_BYTES:
        return None
    library = content[:-_DIGEST_BYTES]
    return library if content[-_DIGEST_BYTES:] == _digest(file, library) else None


def _digest(file: str, library: bytes) -> bytes:
    return hashlib.sha256(file.encode() + b"\0" + library).digest()


def _load(library: bytes, load: Callable[[str], Loaded], folder: Path) -> Loaded:
    # some systems have no files in memory, or run no code from them
    with suppress(OSError, RuntimeError, AttributeError), _in_memory(library) as path:
        return load(path)
    with _build_folder(folder) as temporary:
        path = temporary / "library.so"
        path.write_bytes(library)
        return load(str(path))


@contextmanager
def _in_memory(library: bytes) -> Iterator[str]:
    """Yield the path of an in-memory file that holds ``library``.

    Never the same path twice: the loader recognises libraries by their path and would return an older one.
    """
    with open(os.memfd_create("diversevit"), "wb") as file:
        file.write(library)
        file.flush()
        yield f"/proc/self/fd/{'./' * next(_numbers)}{file.fileno()}"


@contextmanager
def _build_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside ``folder``; delete those that killed processes left behind."""
    for left in folder.glob(f"{_BUILD_PREFIX}*"):
        with suppress(OSError):
            if time.time() - left.lstat().st_mtime > _MAX_BUILD_SECONDS:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(
        prefix=_BUILD_PREFIX, dir=folder, ignore_cleanup_errors=True
    ) as temporary:
        yield Path(temporary)


def _capabilities() -> str:
    """Return what PyTorch says of the processor: a list, before 2.11 one word."""
    listed = getattr(torch.cpu, "get_capabilities", None)
    return str(sorted(listed().items())) if listed else torch.backends.cpu.get_cpu_capability()


def _processor_features() -> str:
    """Return what the system says of the first processor: compilers use more features than PyTorch lists."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = itertools.takewhile(str.strip, file)
        kinds = ("flags", "features", "model", "cpu ", "isa")
        return "".join(
            line for line in first if line.lower().startswith(kinds) and "MHz" not in line
        )
    return ""


def warn_once(name: str, error: Exception) -> None:
    """Warn that ``name`` could not be compiled, unless this process has warned already."""
    global _warned
    if not _warned:
        _warned = True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"diversevit: {name} could not be compiled ({reason[:300]}); "
            "running the slower path (DIVERSEVIT_COMPILE=0 stops trying)",
            stacklevel=3,
        )
