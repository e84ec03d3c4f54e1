"""C++ kernels (``csrc/*.cpp``): compiled for this processor on first use, cached on disk, called through ``ctypes``.

The sources have a plain C interface and include no PyTorch header, so that the machine's C++ compiler needs only
seconds for one. Where nothing can be compiled there is one warning, and the operators take another path.

Where the compiled files are and how they are checked: ``library_cache``.
"""

import ctypes
from pathlib import Path

from ...common.forks import ForkSafe
from . import compiler, library_cache

_SOURCES = Path(__file__).parents[1] / "csrc"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
_PROCESSOR_FLAGS = (("-march=native",), ("-mcpu=native",))
"""Flags for all instructions of this processor, tried in order: x86 compilers take the first, others the second."""

_loaded: dict[str, ctypes.CDLL | None] = {}
_guard = ForkSafe()


def library(name: str) -> ctypes.CDLL | None:
    """Return the compiled ``csrc/<name>.cpp``; None where compiling is switched off or fails."""
    if not library_cache.enabled():
        return None
    if name not in _loaded:
        with _guard.lock:
            if name not in _loaded:
                _loaded[name] = _load(name)
    return _loaded[name]


def _load(name: str) -> ctypes.CDLL | None:
    try:
        command = compiler.command()
        sources = (p.read_text(encoding="utf-8") for p in sorted(_SOURCES.iterdir()) if p.is_file())
        made_from = (*sources, str(command), str(_FLAGS), str(_PROCESSOR_FLAGS))
        file = library_cache.file_name(name, *made_from)
        return library_cache.load_or_build(
            file, lambda folder: _build(name, command, folder), ctypes.CDLL
        )
    except (OSError, RuntimeError) as error:
        library_cache.warn_once(name, error)
        return None


def _build(name: str, command: list[str], folder: Path) -> Path:
    """Compile ``csrc/<name>.cpp`` into ``folder``.

    Raises:
        OSError: the compiler fails with each of ``_PROCESSOR_FLAGS``, and what it said.
    """
    made, reasons = folder / f"{name}.so", []
    for processor_flags in _PROCESSOR_FLAGS:
        source = str(_SOURCES / f"{name}.cpp")
        try:
            compiler.run([*command, *_FLAGS, *processor_flags, source, "-o", str(made)])
        except OSError as error:
            reasons.append(str(error))
        else:
            return made
    raise OSError("; ".join(dict.fromkeys(reasons)))
