"""Which kernels run: one name per backend, chosen at every launch.

A backend is a package with one module per stage (``attention``, ``layer_norm`` ...) whose functions are
the rungs ``<stage>_forward``, ``<stage>_backward``, ``<stage>_double_backward``. Adding a backend is
adding a row to ``_BACKENDS``. Nothing is imported before it is launched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError, expected


@dataclass(frozen=True)
class _Backend:
    module: str  # "{stage}" is replaced by the stage's name
    devices: tuple[str, ...] | None  # None: any
    missing: str | None = None  # why it cannot run at all


_BACKENDS = {
    "triton": _Backend(
        "diversevit_kernels.triton.{stage}",
        ("cuda", "xpu"),
        "this version has no Triton kernels yet",
    ),
    "cpu": _Backend("diversevit_kernels.cpu.{stage}", ("cpu",)),
    "reference": _Backend("diversevit_fast.reference", None),
}
_chosen = "auto"  # process-wide: autograd runs backward passes on threads of its own


def unavailable() -> dict[str, str | None]:
    """Every backend, and why it cannot be used here (``None``: it can)."""
    return {name: backend.missing for name, backend in _BACKENDS.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every operator runs on backend ``name``, in backward passes too.

    Args:
        name: ``"auto"`` (Triton on GPU tensors, the blocked path on CPU tensors), ``"triton"``,
            ``"cpu"`` or ``"reference"`` (plain PyTorch, any device, N x N memory).

    The choice belongs to the process, not to the thread: autograd has threads of its own.

    Raises:
        UsageError: unknown name.
        UnsupportedError: the backend cannot run here; the message says why.
    """
    global _chosen
    if name != "auto" and name not in _BACKENDS:
        names = ", ".join(["auto", *_BACKENDS])
        raise expected("use_backend", f"one of {names}", repr(name), "check the spelling")
    if name != "auto" and (reason := _BACKENDS[name].missing):
        raise UnsupportedError(f"use_backend: {name!r} is unavailable: {reason}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def launch(stage: str, rung: str, *args: Any) -> Any:
    """Run ``<stage>_<rung>`` of the chosen backend on ``args``; the first is a tensor.

    Autocast is off inside: a kernel decides its own precision.
    """
    device = args[0].device.type
    kernel = _kernel(_chosen, device, stage, f"{stage}_{rung}")
    if not torch.is_autocast_enabled(device):
        return kernel(*args)
    with torch.autocast(device, enabled=False):
        return kernel(*args)


@cache
def _kernel(chosen: str, device: str, stage: str, function: str) -> Callable[..., Any]:
    name = chosen if chosen != "auto" else ("cpu" if device == "cpu" else "triton")
    backend = _BACKENDS[name]
    if backend.missing:
        raise UnsupportedError(
            f"backend {name!r} is unavailable for {device} tensors: {backend.missing}; "
            "move the tensors to the CPU, or use dvf.use_backend('reference')"
        )
    if backend.devices is not None and device not in backend.devices:
        raise UnsupportedError(
            f"backend {name!r} runs on {' and '.join(backend.devices)} tensors, not on {device}; "
            "use dvf.use_backend('auto')"
        )
    return getattr(import_module(backend.module.format(stage=stage)), function)


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
