"""Formulas: plain functions of tensors that Inductor compiles into one fused pass for this CPU, cached on disk.

A formula is exported with dynamic sizes, compiled by AOTInductor into a library of its own and loaded from there.
Running it involves neither Dynamo nor Python, so that function modes, an outer ``torch.compile`` and other threads do
not interfere. It is compiled in a new process, which can be killed if a compiler hangs, and with a private folder:
Inductor's default is in /tmp, where others can write. Where this fails (no C++ compiler, a read-only folder) there is
one warning, and the caller takes another path.

Where the compiled files are and how they are checked: ``library_cache``.
"""

import inspect
import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.forks import ForkSafe, after_fork_in_child
from ...common.torch_internals import compile_into_package, runner_of
from . import compiler, library_cache

MIN_ELEMENTS = 1 << 16
"""Smaller tensors do not repay the seconds that compiling takes: they take the other path."""

_OPTIONS = {"cpp.dynamic_threads": True}  # as many threads as the process has when it calls

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Formula:
    """A function of contiguous tensors and what is needed to export it.

    ``examples(dtype)`` returns arguments for the export. Axes named in ``dynamic`` may have any size from 2 on; equal
    names have equal sizes.
    """

    name: str
    function: Function
    examples: Callable[[torch.dtype], tuple[Tensor, ...]]
    dynamic: tuple[
        tuple[str | None, ...], ...
    ]  # a name per axis of each argument; None: fixed size


class _Module(torch.nn.Module):
    def __init__(self, function: Function):
        super().__init__()
        self._function = function

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        return self._function(*operands)


_loaded: dict[tuple[str, torch.dtype], Function | None] = {}
# A forked child neither uses nor frees what its parent has loaded: a thread of the parent may have been inside.
_of_parents: list[Any] = []
_guard = ForkSafe()


def _forget_loaded() -> None:
    """Make a forked child load its formulas again, since each has a lock of its own."""
    global _loaded
    _of_parents.append(_loaded)
    _loaded = {key: None for key, function in _loaded.items() if function is None}


after_fork_in_child(_forget_loaded)


def compiled(formula: Formula, dtype: torch.dtype) -> Function | None:
    """Return ``formula`` compiled for ``dtype``; None where compiling is switched off or fails."""
    if not library_cache.enabled():
        return None
    key = formula.name, dtype
    if key not in _loaded:
        with _guard.lock:
            if key not in _loaded:
                _loaded[key] = _load(formula, dtype)
    return _loaded[key]


def compiled_if_worth(formula: Formula, dtype: torch.dtype, elements: int) -> Function | None:
    """Return the compiled formula if ``elements`` repay compiling it, else None; float64 is never compiled."""
    worth = elements >= MIN_ELEMENTS and dtype != torch.float64
    return compiled(formula, dtype) if worth else None


def _load(formula: Formula, dtype: torch.dtype) -> Function | None:
    try:
        command = compiler.command()
        file = file_of(formula, dtype)
        return library_cache.load_or_build(
            file, lambda folder: _build_in_new_process(formula, dtype, command, file, folder), _open
        )
    except Exception as error:  # compilers can fail in any way, and there is another path
        library_cache.warn_once(formula.name, error)
        return None


def _open(path: str) -> Function:
    model = runner_of(path)
    return lambda *operands: tuple(model.run(list(operands)))


def file_of(formula: Formula, dtype: torch.dtype) -> str:
    """Return the file name of the compiled formula in the cache."""
    made_from = inspect.getsource(formula.function), str(formula.dynamic), str(_OPTIONS)
    name = f"{formula.name}_{str(dtype).removeprefix('torch.')}"
    return library_cache.file_name(name, *made_from, torch.__version__)


_COMPILE = """
import sys
sys.path[:] = sys.argv[5:]
from diversevit_kernels.cpu.runtime import inductor
try:
    inductor.build(*sys.argv[1:5])
except Exception as error:
    sys.exit(f"error: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
"""


_ENVIRONMENTS = ({"TORCHINDUCTOR_VEC_ISA_OK": "1"}, {})
"""Tried in order. The first skips Inductor's test of the compiler's vector instructions, as slow as compiling."""


def _build_in_new_process(
    formula: Formula, dtype: torch.dtype, command: list[str], file: str, folder: Path
) -> Path:
    """Compile in a new process, which finds the formula by its name, and return the library's path.

    Raises:
        OSError: compiling fails in each of ``_ENVIRONMENTS``, and why.
    """
    where = formula.function.__module__, formula.name, str(dtype).removeprefix("torch.")
    made, paths, reasons = folder / file, [os.path.abspath(p) for p in sys.path], []
    for attempt in _ENVIRONMENTS:
        own = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        if os.environ.get("CXX"):  # without it Inductor searches for a compiler that it knows
            own["CXX"] = _executable(command, folder)
        arguments = [sys.executable, "-c", _COMPILE, *where, str(made), *paths]
        try:
            compiler.run(arguments, environment={**attempt, **os.environ, **own})
        except OSError as error:
            reasons.append(str(error))
        else:
            return made
    raise OSError("; ".join(dict.fromkeys(reasons)))


def _executable(command: list[str], folder: Path) -> str:
    """Return the compiler as a single executable, a script if need be: some Inductor versions take no more.

    Raises:
        OSError: there is no such command; Inductor needs long to find that out.
    """
    if shutil.which(command[0]) is None:
        raise OSError(f"CXX: there is no {command[0]}")
    if len(command) == 1:
        return command[0]
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return str(script)


def build(module: str, name: str, dtype_name: str, path: str) -> None:
    """Compile the formula called ``name`` of a module into a library at ``path``.

    Raises:
        OSError: the formula's source has changed since ``path`` was named after it.
    """
    found: Any = vars(import_module(module)).values()
    formula = next(x for x in found if isinstance(x, Formula) and x.name == name)
    dtype = getattr(torch, dtype_name)
    if file_of(formula, dtype) != Path(path).name:
        raise OSError("the source was changed meanwhile")
    package = f"{path}.pt2"
    compile_into_package(_exported(formula, dtype), package, **dict(_OPTIONS))
    with zipfile.ZipFile(package) as members:
        (library,) = (n for n in members.namelist() if n.endswith(".so"))
        Path(path).write_bytes(members.read(library))


def _exported(formula: Formula, dtype: torch.dtype) -> torch.export.ExportedProgram:
    sizes: dict[str, Any] = {
        name: torch.export.Dim(name, min=2) for axes in formula.dynamic for name in axes if name
    }
    dynamic = tuple(
        {axis: sizes[name] for axis, name in enumerate(axes) if name} for axes in formula.dynamic
    )
    with torch.no_grad():
        return torch.export.export(
            _Module(formula.function), formula.examples(dtype), dynamic_shapes=(dynamic,)
        )
