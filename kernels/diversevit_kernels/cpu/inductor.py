"""Formulas compiled for this CPU by Inductor: rows and elements fused in one pass, kept on disk.

A formula is a plain function of tensors. It is exported with free sizes, compiled by AOTInductor into a library of
its own and loaded from there: at run time neither Dynamo nor Python takes part, so function modes, an outer
``torch.compile`` and other threads do not matter. Where that cannot be (no C++ compiler, a read-only folder), there is
one warning and the caller's other path.

Folder and environment: ``compiled_files``.
"""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from . import compiled_files

LEAST_ELEMENTS = 1 << 16
"""Smaller tensors are not worth the seconds that compiling takes: they go the other path."""

_OPTIONS = {"cpp.dynamic_threads": True}  # as many threads as the process has when it calls

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Formula:
    """A function of contiguous tensors, and how to call it once.

    ``examples(dtype)`` are arguments for the export: axes named in ``free`` may have any size from 2 on.
    """

    name: str
    function: Function
    examples: Callable[[torch.dtype], tuple[Tensor, ...]]
    free: tuple[tuple[str | None, ...], ...]  # per argument: a name per axis; None keeps its size


class _Module(torch.nn.Module):
    def __init__(self, function: Function):
        super().__init__()
        self._function = function

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        return self._function(*operands)


_loaded: dict[tuple[str, torch.dtype], Function | None] = {}
_lock = Lock()


def compiled(formula: Formula, dtype: torch.dtype) -> Function | None:
    """``formula`` compiled for arguments of ``dtype``; None where compiling is off or fails."""
    if not compiled_files.allowed():
        return None
    key = formula.name, dtype
    if key not in _loaded:
        with _lock:
            if key not in _loaded:
                _loaded[key] = _load(formula, dtype)
    return _loaded[key]


def compiled_if_worth(formula: Formula, dtype: torch.dtype, elements: int) -> Function | None:
    """The compiled formula for so many elements, if they are worth it; float64 is never compiled."""
    worth = elements >= LEAST_ELEMENTS and dtype != torch.float64
    return compiled(formula, dtype) if worth else None


def _load(formula: Formula, dtype: torch.dtype) -> Function | None:
    """From disk, or compiled now. In a thread of its own, where no mode of the caller is active."""
    try:
        with ThreadPoolExecutor(1) as alone:
            return alone.submit(_load_alone, formula, dtype).result()
    except Exception as error:  # a compiler can fail in any way, and there is another path
        compiled_files.warn_once(formula.name, error)
        return None


def _load_alone(formula: Formula, dtype: torch.dtype) -> Function:
    path = library(formula, dtype)
    if not path.exists():
        _build(formula, dtype, path)
    model: Any = torch._inductor.aoti_load_package(str(path))
    return model


def _build(formula: Formula, dtype: torch.dtype, path: Path) -> None:
    sizes: dict[str, Any] = {
        name: torch.export.Dim(name, min=2) for axes in formula.free for name in axes if name
    }
    free = tuple(
        {axis: sizes[name] for axis, name in enumerate(axes) if name} for axes in formula.free
    )
    with torch.no_grad():
        program = torch.export.export(
            _Module(formula.function), formula.examples(dtype), dynamic_shapes=(free,)
        )
    with compiled_files.written_whole(path) as made:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(made), inductor_configs=dict(_OPTIONS)
        )


def library(formula: Formula, dtype: torch.dtype) -> Path:
    """Where the compiled formula lies, if it is compiled."""
    made_from = inspect.getsource(formula.function), str(formula.free), str(_OPTIONS)
    name = f"{formula.name}_{str(dtype).removeprefix('torch.')}"
    return compiled_files.path_of(name, ".pt2", *made_from, torch.__version__)
