"""Describe versions and machine for ``config.json`` and ``doctor``, and choose the device."""

import os
import platform
import reprlib
import shutil
import subprocess
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.load import FIXED_SIZES
from ..errors import usage_error
from ..installation import DISTRIBUTION, version_of
from ..models import DiverseViT
from ..models.restore import skeleton
from ..models.sizes import training_bytes
from ..ops import backends
from .config import DIVERSEVIT, Settings

PACKAGES = (
    DISTRIBUTION,
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


def versions() -> dict[str, str | None]:
    """Return the versions of Python and the packages by name."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}


def commit() -> str | None:
    """Return the commit of the checkout that this package lies in, with ``+`` where tracked files differ from it."""
    git, here = shutil.which("git"), Path(__file__).parent
    if git is None:
        return None

    def ask(*words: str) -> str | None:
        asked = subprocess.run([git, "-C", str(here), *words], capture_output=True, text=True)
        return asked.stdout.strip() if asked.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed, or a copy
        return None
    head = ask("rev-parse", "--short", "HEAD")
    return head and head + ("+" if ask("status", "--porcelain", "--untracked-files=no") else "")


def changes(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the line that lists the versions that changed."""
    listed = ", ".join(
        f"{name} {v or 'none'} (was {before.get(name) or 'none'})" for name, v in now.items()
    )
    return f"{what} {listed}: the rest may differ in rounding from a run that was not interrupted"


def describe_machine() -> dict[str, str | int]:
    """Describe processor, cores, operating system, and the GPU where there is one."""
    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def choose_device(name: str) -> torch.device:
    """Return the device for a setting; ``"auto"`` is CUDA where the GPU kernels can run, else the CPU.

    Raises:
        UsageError: PyTorch does not know the device or cannot compute on it.
    """
    if name == "auto":
        fast = torch.cuda.is_available() and backends.unavailable()["triton"] is None
        return torch.device("cuda" if fast else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old kinds
            device = torch.device(name)
            computes = torch.ones(1, device=device).add(1).item() == 2  # meta has no numbers
    except Exception:  # each kind of device that is not there raises another
        computes = False
    if not computes:
        wanted = "auto, or a device of this machine"
        raise usage_error("device", wanted, reprlib.repr(name), "use cpu")
    return device


def check_model(settings: Settings, device: torch.device, data: Any = None) -> None:
    """Raise if training the model can never fit the device's memory, before allocating anything.

    Args:
        data: the training data; None before they are read, when the size of a folder's images may not be known.

    Raises:
        UsageError: sizes that make no model, or the device's whole memory is less than the least it takes.
    """
    if settings.architecture != DIVERSEVIT:
        return  # timm's models are of known sizes, and built before anything is written
    if data is not None:
        size, classes, samples = data.image_size, data.num_classes, len(data.labels)
    else:
        resized = None if settings.img_size is None else (settings.img_size, settings.img_size)
        size, classes, samples = resized or FIXED_SIZES.get(settings.data), 2, 1
        if size is None:
            return
    config = skeleton(
        DiverseViT, {"image_size": size, "num_classes": classes, **settings.model}
    ).config
    needed = training_bytes(config, min(settings.batch_size, samples))
    there = _memory_of(device)
    if there is not None and needed > there:
        wanted = f"a model that fits {device.type}'s memory of {there / 1e9:.0f} GB"
        got = f"one whose training takes {needed / 1e9:.3g} GB"
        raise usage_error("model", wanted, got, "make it, or the batches, smaller")


def check_threads(count: int) -> None:
    """Raise if ``threads`` exceeds what the system lets this process start: OpenMP would abort.

    Raises:
        UsageError: one of ``count - 1`` more threads did not start.
    """
    gate = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count - 1):
            thread = threading.Thread(target=gate.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        hint = f"use --threads {max(1, len(started) // 2)}"
        raise usage_error("threads", "as many as the system lets us start", count, hint) from None
    finally:
        gate.set()
        for thread in started:
            thread.join()


def _memory_of(device: torch.device) -> int | None:
    """Return the memory of a device in bytes, or None where unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
