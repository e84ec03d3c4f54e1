"""Which kernels run: one name per backend, chosen at every launch.

A backend is a package with one module per stage (``attention``, ``layer_norm`` ...) whose functions are
the rungs ``<stage>_forward``, ``<stage>_backward``, ``<stage>_double_backward``. Adding a backend is
adding a row to ``_BACKENDS``. Nothing is imported before it is launched.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, usage_error


@dataclass(frozen=True)
class _Backend:
    module: str  # "{operator}" is replaced by the operator's folder
    devices: tuple[str, ...] | None  # None: any
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here at all


def _interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_missing() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if _interpreted() or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "there is no GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"


_BACKENDS = {
    "triton": _Backend(
        "diversevit_kernels.triton.{operator}",
        ("cuda", "xpu", "cpu") if _interpreted() else ("cuda", "xpu"),
        _triton_missing,
    ),
    "cpu": _Backend("diversevit_kernels.cpu.{operator}", ("cpu",)),
    "reference": _Backend("diversevit_fast.ops.reference", None),
}
_FOLDERS = {"routed_head_penalty": "head_penalty"}
"""Operators that lie in another's folder."""

_chosen = "auto"  # process-wide: autograd runs backward passes on threads of its own


def chosen_backend() -> str:
    """What ``use_backend`` was told last."""
    return _chosen


def unavailable() -> dict[str, str | None]:
    """Every backend, and why it cannot be used here (``None``: it can)."""
    return {name: backend.missing() for name, backend in _BACKENDS.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every operator runs on backend ``name``, in backward passes too.

    Args:
        name: ``"auto"`` (Triton on GPU tensors, the blocked path on CPU tensors), ``"triton"``,
            ``"cpu"`` or ``"reference"`` (plain PyTorch, any device, N x N memory; what is recorded
            under it is differentiable to any order).

    The choice belongs to the process, not to the thread: autograd has threads of its own.

    Raises:
        UsageError: unknown name.
        UnsupportedError: the backend cannot run here; the message says why.
    """
    global _chosen
    if name != "auto" and name not in _BACKENDS:
        names = ", ".join(["auto", *_BACKENDS])
        raise usage_error("use_backend", f"one of {names}", repr(name), "check the spelling")
    if name != "auto" and (reason := _BACKENDS[name].missing()):
        raise UnsupportedError(f"use_backend: {name!r} is unavailable: {reason}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def launch(stage: str, rung: str, *args: Any, **options: Any) -> Any:
    """Run ``<stage>_<rung>`` of the chosen backend; the first of ``args`` is a tensor.

    Autocast is off inside: a kernel decides its own precision.
    """
    device = args[0].device.type
    kernel = _kernel(_chosen, device, stage, f"{stage}_{rung}")
    try:
        if not torch.is_autocast_enabled(device):
            return kernel(*args, **options)
        with torch.autocast(device, enabled=False):
            return kernel(*args, **options)
    except NotImplementedError as refusal:
        raise UnsupportedError(f"{refusal}; dvf.use_backend('reference') runs anything") from None


def compile_ahead(dtype: torch.dtype) -> list[str]:
    """Names of the CPU backend's formulas that are now compiled for ``dtype``."""
    return import_module("diversevit_kernels.cpu.warmup").warmup(dtype)


def empty_cpu_cache() -> None:
    """Return the memory of freed CPU results to the system.

    On Linux, results of 1 MiB or more are allocated from huge pages and cached for reuse after they are freed, at most
    256 MiB in all, because page faults would otherwise dominate. Memory of live tensors is not touched.
    """
    import_module("diversevit_kernels.cpu.runtime.allocator").empty_cache()


@cache
def _kernel(chosen: str, device: str, stage: str, function: str) -> Callable[..., Any]:
    name = chosen if chosen != "auto" else ("cpu" if device == "cpu" else "triton")
    backend = _BACKENDS[name]
    if reason := backend.missing():
        raise UnsupportedError(
            f"backend {name!r} is unavailable for {device} tensors: {reason}; "
            "move the tensors to the CPU, or use dvf.use_backend('reference')"
        )
    if backend.devices is not None and device not in backend.devices:
        raise UnsupportedError(
            f"backend {name!r} runs on {' and '.join(backend.devices)} tensors, not on {device}; "
            "use dvf.use_backend('auto')"
        )
    folder = _FOLDERS.get(stage, stage)
    return getattr(import_module(backend.module.format(operator=folder)), function)


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, floating tensors other than float64 in the autocast dtype; else as they are."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)
        for t in tensors
    )
