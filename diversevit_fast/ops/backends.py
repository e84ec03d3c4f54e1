"""Which kernels run: the backends, and the one that is chosen.

A backend is a package with a folder per operator, whose functions are those of the operator's protocol in
``diversevit_kernels.common.contracts``. Adding a backend is adding a row to ``_BACKENDS``. Nothing of it is imported
before an operator looks its kernels up, at every call.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from diversevit_kernels.common.contracts import (
    AttentionKernels,
    GeluKernels,
    HeadPenaltyKernels,
    LayerNormKernels,
    RoutedHeadPenaltyKernels,
)

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
_FOLDERS: dict[type, str] = {
    AttentionKernels: "attention",
    LayerNormKernels: "layer_norm",
    GeluKernels: "gelu",
    HeadPenaltyKernels: "head_penalty",
    RoutedHeadPenaltyKernels: "head_penalty",
}
"""The folder of a backend that has a protocol's functions."""

Kernels = TypeVar("Kernels")

_chosen = "auto"  # process-wide: autograd runs backward passes on threads of its own


def chosen_backend() -> str:
    """The name that ``use_backend`` was given last."""
    return _chosen


def unavailable() -> dict[str, str | None]:
    """Every backend by name, and why it cannot be used here (``None``: it can)."""
    return {name: backend.missing() for name, backend in _BACKENDS.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every operator runs on backend ``name``, in backward passes too.

    Args:
        name: ``"auto"`` (Triton on GPU tensors, with PyTorch's own kernels for the first order of GELU and
            LayerNorm; the blocked path on CPU tensors), ``"triton"``, ``"cpu"`` or ``"reference"`` (plain
            PyTorch, any device, N x N memory; what is recorded under it is differentiable to any order).

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


def kernels(protocol: type[Kernels], x: Tensor) -> Kernels:
    """The functions of ``protocol`` in the chosen backend, for tensors on the device of ``x``.

    Raises:
        UnsupportedError: the backend cannot run here, or not on this device.
    """
    return _kernels(protocol, _chosen, x.device)


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which runs Triton kernels, without their host code where a call like it was made before."""
    return import_module("diversevit_kernels.triton.runtime.recorded").Recorded(function)


def compile_ahead(dtype: torch.dtype) -> list[str]:
    """Names of the CPU backend's formulas that are now compiled for ``dtype``."""
    return import_module("diversevit_kernels.cpu.warmup").warmup(dtype)


def cache_folder() -> Path:
    """Return the user's cache folder, ``DIVERSEVIT_CACHE_DIR`` or the usual one; create it if it is missing.

    Raises:
        OSError: it cannot be created, or others could write there.
    """
    return import_module("diversevit_kernels.cpu.runtime.cache_folder").folder()


def empty_cpu_cache() -> None:
    """Return the memory of freed CPU results to the system.

    On Linux, results of 1 MiB or more are allocated from huge pages and cached for reuse after they are freed, at most
    256 MiB in all, because page faults would otherwise dominate. Memory of live tensors is not touched.
    """
    import_module("diversevit_kernels.cpu.runtime.allocator").empty_cache()


@cache
def _kernels(protocol: type, chosen: str, on: torch.device) -> Any:
    device = on.type
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
    return import_module(backend.module.format(operator=_FOLDERS[protocol]))


def folder_of(function: str) -> str:
    """The folder of a backend that has ``function``, which is named after its operator.

    Raises:
        LookupError: no protocol's folder is part of the name.
    """
    found = [folder for folder in _FOLDERS.values() if folder in function]
    if not found:
        raise LookupError(f"no folder of {sorted(set(_FOLDERS.values()))} has {function}")
    return max(found, key=len)


if TYPE_CHECKING:  # the type checker compares every backend's functions with the protocols
    import diversevit_kernels.cpu.attention as cpu_attention
    import diversevit_kernels.cpu.gelu as cpu_gelu
    import diversevit_kernels.cpu.head_penalty as cpu_head_penalty
    import diversevit_kernels.cpu.layer_norm as cpu_layer_norm
    import diversevit_kernels.triton.attention as triton_attention
    import diversevit_kernels.triton.gelu as triton_gelu
    import diversevit_kernels.triton.head_penalty as triton_head_penalty
    import diversevit_kernels.triton.layer_norm as triton_layer_norm

    from . import reference

    _attention: list[AttentionKernels] = [reference, cpu_attention, triton_attention]
    _layer_norm: list[LayerNormKernels] = [reference, cpu_layer_norm, triton_layer_norm]
    _gelu: list[GeluKernels] = [reference, cpu_gelu, triton_gelu]
    _head_penalty: list[HeadPenaltyKernels] = [reference, cpu_head_penalty, triton_head_penalty]
    _routed: list[RoutedHeadPenaltyKernels] = [reference, cpu_head_penalty, triton_head_penalty]
