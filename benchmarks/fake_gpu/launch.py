"""Programs that run on the fake GPU: the environment of a process, and what it sets before anything else."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .build import LIBRARY, build

MARK = "FAKE_GPU_FOLDER"
"""Set in a process that runs on the fake GPU."""


def environment(
    copies: bool = False, launch_ns: int = 0, folder: Path | None = None
) -> dict[str, str]:
    """Return the environment of a process that runs on the fake GPU.

    Args:
        copies: carry copies and memsets out, see README.md.
        launch_ns: how long a launch, product, copy or replay keeps the host busy.
        folder: where the driver is built and Triton keeps what it compiled; by default in the cache folder.
    """
    built = build(folder)
    kernels = built / "triton" if folder else built.parent / "triton"
    return {
        **{key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        MARK: str(built),
        "LD_PRELOAD": str(built / LIBRARY),
        "TRITON_LIBCUDA_PATH": str(built),
        "TRITON_CACHE_DIR": str(kernels),
        "CUDA_MODULE_LOADING": "LAZY",
        "FAKE_GPU_COPIES": str(int(copies)),
        "FAKE_GPU_LAUNCH_NS": str(launch_ns),
    }


def command(program: Sequence[str]) -> list[str]:
    """Return the command that runs ``program``, what would follow ``python``: a script, ``-m`` or ``-c``."""
    return [sys.executable, "-m", "benchmarks.fake_gpu.inside", *program]


def run(
    program: Sequence[str], copies: bool = False, launch_ns: int = 0, folder: Path | None = None
) -> int:
    """Run a program on the fake GPU, with this process' output; return its exit status."""
    with_gpu = environment(copies, launch_ns, folder)
    return subprocess.run(command(program), env=with_gpu, check=False).returncode


def here() -> bool:
    """Whether this process runs on the fake GPU."""
    return MARK in os.environ
