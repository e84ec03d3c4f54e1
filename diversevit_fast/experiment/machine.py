"""What a run runs on: versions and machine, for ``config.json`` and ``doctor``, and the device."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..errors import expected

PACKAGES = (
    "diversevit-fast",
    "torch",
    "triton",
    "numpy",
    "scikit-learn",
    "safetensors",
    "timm",
    "torchvision",
    "transformers",
    "matplotlib",
    "rich",
    "typer",
    "tensorboard",
)


def version_of(package: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Python's and the packages' versions by name."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}


def changes(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The line that says which versions are others than they were."""
    listed = ", ".join(
        f"{name} {v or 'none'} (was {before.get(name) or 'none'})" for name, v in now.items()
    )
    return f"{what} {listed}: the rest may differ in rounding from a run that was not interrupted"


def describe_machine() -> dict[str, str | int]:
    """Processor, cores and operating system; the GPU where there is one."""
    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def choose_device(name: str) -> torch.device:
    """``"auto"``: CUDA where the GPU kernels can run, else the CPU.

    Raises:
        UsageError: PyTorch does not know the device or cannot use it.
    """
    if name == "auto":
        fast = torch.cuda.is_available() and backends.unavailable()["triton"] is None
        return torch.device("cuda" if fast else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise expected(
            "device", "auto, or a device of this machine", repr(name), "use cpu"
        ) from None
    return device


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
