"""C++ kernels of the CPU backend: compiled for this processor at first use, kept on disk, called through ``ctypes``.

A source in ``native/`` has a plain C interface and includes nothing of PyTorch, so the machine's C++ compiler
(``commands``) needs seconds for it. Where nothing can be compiled there is one warning and the caller's other path.

Folder and environment: ``compiled_files``.
"""

import ctypes
from pathlib import Path

from ...common.forks import ForkSafe
from . import commands, compiled_files

_SOURCES = Path(__file__).parents[1] / "csrc"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
_PROCESSORS = (("-march=native",), ("-mcpu=native",))
"""How compilers are told to use all of the processor, tried in order: x86, then others."""

_loaded: dict[str, ctypes.CDLL | None] = {}
_guard = ForkSafe()


def library(name: str) -> ctypes.CDLL | None:
    """The functions of ``native/<name>.cpp``; None where compiling is off or fails."""
    if not compiled_files.allowed():
        return None
    if name not in _loaded:
        with _guard.lock:
            if name not in _loaded:
                _loaded[name] = _load(name)
    return _loaded[name]


def _load(name: str) -> ctypes.CDLL | None:
    try:
        command = commands.compiler()
        sources = (p.read_text(encoding="utf-8") for p in sorted(_SOURCES.iterdir()) if p.is_file())
        made_from = (*sources, str(command), str(_FLAGS), str(_PROCESSORS))
        file = compiled_files.name_of(name, *made_from)
        return compiled_files.loaded(file, lambda folder: _build(name, command, folder), _open)
    except (OSError, RuntimeError) as error:
        compiled_files.warn_once(name, error)
        return None


def _open(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def _build(name: str, command: list[str], folder: Path) -> Path:
    made, reasons = folder / f"{name}.so", []
    for processor in _PROCESSORS:
        source = str(_SOURCES / f"{name}.cpp")
        try:
            commands.run([*command, *_FLAGS, *processor, source, "-o", str(made)])
        except OSError as error:
            reasons.append(str(error))
        else:
            return made
    raise OSError("; ".join(dict.fromkeys(reasons)))
