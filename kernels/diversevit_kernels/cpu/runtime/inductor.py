"""Formulas compiled for this CPU by Inductor: rows and elements fused in one pass, kept on disk.

A formula is a plain function of tensors. It is exported with free sizes, compiled by AOTInductor into a library of
its own and loaded from there: at run time neither Dynamo nor Python takes part, so function modes, an outer
``torch.compile`` and other threads do not matter. A process of its own compiles, in a folder of its own: Inductor's
is in /tmp, where others may have been before, and a compiler that hangs can be ended. Where that cannot be (no C++
compiler, a read-only folder), there is one warning and the caller's other path.

Folder and environment: ``compiled_files``.
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
from . import commands, compiled_files

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
_of_parents: list[
    Any
] = []  # what a forked child does not use, nor free: a thread of its parent may be inside
_guard = ForkSafe()


def _leave_to_the_parent() -> None:
    """In a forked child: load again, since a loaded formula has a lock of its own."""
    global _loaded
    _of_parents.append(_loaded)
    _loaded = {key: None for key, function in _loaded.items() if function is None}


after_fork_in_child(_leave_to_the_parent)


def compiled(formula: Formula, dtype: torch.dtype) -> Function | None:
    """``formula`` compiled for arguments of ``dtype``; None where compiling is off or fails."""
    if not compiled_files.allowed():
        return None
    key = formula.name, dtype
    if key not in _loaded:
        with _guard.lock:
            if key not in _loaded:
                _loaded[key] = _load(formula, dtype)
    return _loaded[key]


def compiled_if_worth(formula: Formula, dtype: torch.dtype, elements: int) -> Function | None:
    """The compiled formula for so many elements, if they are worth it; float64 is never compiled."""
    worth = elements >= LEAST_ELEMENTS and dtype != torch.float64
    return compiled(formula, dtype) if worth else None


def _load(formula: Formula, dtype: torch.dtype) -> Function | None:
    try:
        command = commands.compiler()
        file = file_of(formula, dtype)
        return compiled_files.loaded(
            file, lambda folder: _build_apart(formula, dtype, command, file, folder), _open
        )
    except Exception as error:  # a compiler can fail in any way, and there is another path
        compiled_files.warn_once(formula.name, error)
        return None


def _open(path: str) -> Function:
    model: Any = torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1)  # pyright: ignore
    return lambda *operands: tuple(model.run(list(operands)))


def file_of(formula: Formula, dtype: torch.dtype) -> str:
    """The name of the file of the compiled formula."""
    made_from = inspect.getsource(formula.function), str(formula.free), str(_OPTIONS)
    name = f"{formula.name}_{str(dtype).removeprefix('torch.')}"
    return compiled_files.name_of(name, *made_from, torch.__version__)


_COMPILE = """
import sys
sys.path[:] = sys.argv[5:]
from diversevit_kernels.cpu.runtime import inductor
try:
    inductor.build(*sys.argv[1:5])
except Exception as error:
    sys.exit(f"error: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
"""


_TRUST = ({"TORCHINDUCTOR_VEC_ISA_OK": "1"}, {})
"""First as if the compiler knew all vector instructions of this processor: finding out takes as long as compiling."""


def _build_apart(
    formula: Formula, dtype: torch.dtype, command: list[str], file: str, folder: Path
) -> Path:
    """Compile in a new process, which finds the formula by its name."""
    where = formula.function.__module__, formula.name, str(dtype).removeprefix("torch.")
    made, paths, reasons = folder / file, [os.path.abspath(p) for p in sys.path], []
    for trust in _TRUST:
        own = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "CUDA_VISIBLE_DEVICES": "",
        }
        if os.environ.get("CXX"):  # else Inductor looks for one that it knows
            own["CXX"] = _one_word(command, folder)
        arguments = [sys.executable, "-c", _COMPILE, *where, str(made), *paths]
        try:
            commands.run(arguments, environment={**trust, **os.environ, **own})
        except OSError as error:
            reasons.append(str(error))
        else:
            return made
    raise OSError("; ".join(dict.fromkeys(reasons)))


def _one_word(command: list[str], folder: Path) -> str:
    """The compiler as one file, which is what some of Inductor's versions take.

    Raises:
        OSError: there is no such command; Inductor takes long to find that out.
    """
    if shutil.which(command[0]) is None:
        raise OSError(f"CXX: there is no {command[0]}")
    if len(command) == 1:
        return command[0]
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return str(script)


def build(module: str, name: str, kind: str, path: str) -> None:
    """Compile the formula of that name in a module to a library, for a dtype.

    Raises:
        OSError: the formula is no longer what the file's name says.
    """
    found: Any = vars(import_module(module)).values()
    formula = next(x for x in found if isinstance(x, Formula) and x.name == name)
    dtype = getattr(torch, kind)
    if file_of(formula, dtype) != Path(path).name:
        raise OSError("the source was changed meanwhile")
    package = f"{path}.pt2"
    torch._inductor.aoti_compile_and_package(
        _exported(formula, dtype), package_path=package, inductor_configs=dict(_OPTIONS)
    )
    with zipfile.ZipFile(package) as members:
        (library,) = (n for n in members.namelist() if n.endswith(".so"))
        Path(path).write_bytes(members.read(library))


def _exported(formula: Formula, dtype: torch.dtype) -> torch.export.ExportedProgram:
    sizes: dict[str, Any] = {
        name: torch.export.Dim(name, min=2) for axes in formula.free for name in axes if name
    }
    free = tuple(
        {axis: sizes[name] for axis, name in enumerate(axes) if name} for axes in formula.free
    )
    with torch.no_grad():
        return torch.export.export(
            _Module(formula.function), formula.examples(dtype), dynamic_shapes=(free,)
        )
