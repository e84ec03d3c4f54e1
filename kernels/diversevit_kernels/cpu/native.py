"""C++ kernels of the CPU backend: compiled for this processor at first use, kept on disk, called through ``ctypes``.

A source in ``native/`` has a plain C interface and includes nothing of PyTorch, so the machine's C++ compiler needs
seconds for it. The compiler is ``CXX``, else ``c++``. Where nothing can be compiled there is one warning and the
caller's other path.

Folder and environment: ``compiled_files``.
"""

import ctypes
import os
import platform
import subprocess
from pathlib import Path
from threading import Lock

from . import compiled_files

_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
_PROCESSORS = (("-march=native",), ("-mcpu=native",))
"""How compilers are told to use all of the processor, tried in order: x86, then others."""

_loaded: dict[str, ctypes.CDLL | None] = {}
_lock = Lock()


def library(name: str) -> ctypes.CDLL | None:
    """The functions of ``native/<name>.cpp``; None where compiling is off or fails."""
    if not compiled_files.allowed():
        return None
    if name not in _loaded:
        with _lock:
            if name not in _loaded:
                _loaded[name] = _load(name)
    return _loaded[name]


def _load(name: str) -> ctypes.CDLL | None:
    try:
        path = _path(name)
        if not path.exists():
            _build(name, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        compiled_files.warn_once(name, error)
        return None


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _build(name: str, path: Path) -> None:
    with compiled_files.written_whole(path) as made:
        reasons = []
        for processor in _PROCESSORS:
            source = str(_SOURCES / f"{name}.cpp")
            command = (_compiler(), *_FLAGS, *processor, source, "-o", str(made))
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return
            lines = done.stderr.strip().splitlines() or ["the compiler failed silently"]
            reasons.append(next((line for line in lines if "error" in line), lines[0]))
        raise OSError("; ".join(reasons))


def _path(name: str) -> Path:
    sources = (p.read_text(encoding="utf-8") for p in sorted(_SOURCES.iterdir()) if p.is_file())
    flags = _compiler(), str(_FLAGS), str(_PROCESSORS), platform.machine()
    return compiled_files.path_of(name, ".so", *sources, *flags)
