"""C++ kernels of the CPU backend: compiled for this processor at first use, kept on disk, called through ``ctypes``.

A source in ``native/`` has a plain C interface and includes nothing of PyTorch, so the machine's C++ compiler needs
seconds for it. The compiler is ``CXX``, else ``c++``; libraries lie in ``inductor``'s folder under a digest of the
sources, the flags and the processor. Where nothing can be compiled there is one warning and the caller's other path.

Environment  ``DIVERSEVIT_COMPILE=0``: no native kernel is compiled or called.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from threading import Lock

import torch

from . import inductor

_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp")
_PROCESSORS = (("-march=native",), ("-mcpu=native",))
"""How compilers are told to use all of the processor, tried in order: x86, then others."""

_loaded: dict[str, ctypes.CDLL | None] = {}
_lock = Lock()


def library(name: str) -> ctypes.CDLL | None:
    """The functions of ``native/<name>.cpp``; None where compiling is off or fails."""
    if os.environ.get("DIVERSEVIT_COMPILE") == "0":
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
        inductor.warn_once(name, error)
        return None


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _build(name: str, path: Path) -> None:
    """Write ``path`` in one step, so that processes which compile at once do not meet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        for processor in _PROCESSORS:
            command = (
                _compiler(),
                *_FLAGS,
                *processor,
                str(_SOURCES / f"{name}.cpp"),
                "-o",
                str(made),
            )
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                os.replace(made, path)
                return
        raise OSError((done.stderr.strip().splitlines() or ["the compiler failed silently"])[0])


def _path(name: str) -> Path:
    described = (
        *(p.read_text(encoding="utf-8") for p in sorted(_SOURCES.iterdir()) if p.is_file()),
        *(_compiler(), str(_FLAGS), str(_PROCESSORS), platform.machine()),
        str(sorted(torch.cpu.get_capabilities().items())),
    )
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    return inductor.folder() / f"{name}_{digest}.so"
