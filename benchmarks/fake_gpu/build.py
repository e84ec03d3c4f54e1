"""The driver of the fake GPU, compiled with gcc and the CUDA headers of the Triton wheel."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from diversevit_kernels.cpu.runtime import cache_folder

SOURCES = sorted((Path(__file__).parent / "csrc").glob("*.[ch]"))
LIBRARY = "libcuda.so.1"
CUDA = 13
"""The major version whose functions are written; those of others have other signatures."""
_NAMES = re.compile(r" U ((?:__cuda|cuda|cublas|cu[A-Z])\w*)")


UNAVAILABLE = 77
"""The exit status of programs where the fake GPU cannot be built."""


class UnavailableError(Exception):
    """The fake GPU cannot be built here, and why, in one line."""


def unavailable() -> str | None:
    """Return why the fake GPU cannot be built here, or None."""
    for program in ("gcc", "nm"):
        if shutil.which(program) is None:
            return f"the fake GPU needs {program}"
    if find_spec("triton") is None:
        return "the fake GPU needs Triton, for the CUDA headers of its wheel"
    if not (wheel := _torch_version("cuda")).startswith(f"{CUDA}."):
        return f"the fake GPU needs a PyTorch for CUDA {CUDA}; this one is for {wheel}"
    if (found := _header_version()) != CUDA:
        return f"the fake GPU needs headers of CUDA {CUDA}; Triton's are of {found}"
    return None


def build(folder: Path | None = None) -> Path:
    """Return a folder that holds the driver, built there if it is missing.

    Args:
        folder: where; by default one of the cache folder, named after what it is built from.

    Raises:
        UnavailableError: something that it needs is not here.
    """
    if reason := unavailable():
        raise UnavailableError(reason)
    folder = cache_folder.folder() / "fake_gpu" / _fingerprint() if folder is None else folder
    library = folder / LIBRARY
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = _compile(Path(scratch))
            os.replace(made, library)  # whole or not at all, whoever else builds it
    return folder


def _compile(scratch: Path) -> Path:
    first = _link([], scratch)  # what is written in C; the next one adds what does nothing
    missing = _imported() - _defined(first)
    nothing = scratch / "nothing.c"
    lines = "".join(f"NOTHING({name})\n" for name in sorted(missing))
    nothing.write_text(f"#define NOTHING(name) int name(void) {{ return 0; }}\n{lines}")
    return _link([nothing], scratch)


def _link(more: list[Path], scratch: Path) -> Path:
    made = scratch / "made.so"
    sources = [str(one) for one in (*SOURCES, *more) if one.suffix == ".c"]
    command = ["gcc", "-O2", "-fPIC", "-shared", "-w", f"-I{_headers()}", *sources, "-o", str(made)]
    command += [f"-Wl,-soname,{LIBRARY}", "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"gcc could not compile the fake GPU: {done.stderr.strip()[-2000:]}")
    return made


@cache
def _imported() -> set[str]:
    """Names of CUDA's functions that PyTorch's libraries want from elsewhere."""
    libraries = sorted((_package("torch") / "lib").glob("lib*.so"))
    found = [_nm("--undefined-only", path) for path in libraries if "nvshmem" not in path.name]
    return {name for text in found for name in _NAMES.findall(text)}


def _defined(library: Path) -> set[str]:
    return {line.split()[-1] for line in _nm("--defined-only", library).splitlines()}


def _nm(which: str, library: Path) -> str:
    command = ["nm", "-D", which, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _package(name: str) -> Path:
    """The folder of a package, which is not imported: that would take seconds."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _torch_version(field: str) -> str:
    """``__version__`` or ``cuda`` of PyTorch's ``version.py``."""
    text = (_package("torch") / "version.py").read_text(encoding="utf-8")
    found = re.search(rf"^{field}\b.*?= '(.*)'$", text, re.M)
    return found[1] if found else "none"


def _headers() -> Path:
    return _package("triton") / "backends/nvidia/include"


def _header_version() -> int:
    header = _headers() / "cuda.h"
    text = header.read_text(encoding="utf-8", errors="replace") if header.exists() else ""
    found = re.search(r"#define CUDA_VERSION (\d+)", text)
    return int(found[1]) // 1000 if found else 0


@cache
def _fingerprint() -> str:
    told = [path.read_bytes() for path in (*SOURCES, Path(__file__))]
    versions = f"{_torch_version('__version__')} {_headers()}".encode()
    return hashlib.sha256(b"".join([versions, *told])).hexdigest()[:16]
