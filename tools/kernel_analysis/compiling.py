"""Compile what host functions launch, ahead of time and for chips that are not here.

Host functions run on meta tensors under ``device.pretend`` while ``launch.recording`` collects their
launches, so what is compiled is what is launched: same kernel, same specialisation of arguments, same
tiles and options. Launches that Triton would compile to the same binary are compiled once.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from diversevit_kernels.triton.runtime import device, launch
from tools.kernel_analysis.chips import CHIPS
from tools.kernel_analysis.machine_code import Code, read_amdgcn, read_cubin
from tools.kernel_analysis.operators import folder, with_flat_arguments


@dataclass(frozen=True)
class HostCall:
    """One call of a host function. ``call`` gets the function and calls it on meta tensors."""

    operator: str
    order: str  # forward, backward, double_backward
    case: str  # "plain [8, 12, 197, .]"
    dtype: str
    width: int  # what the launch table is keyed by: head width, or features
    call: Callable[[Callable[..., Any]], object]
    binding: bool = True  # whether the limits on registers and tensor cores apply

    def __str__(self) -> str:
        return f"{self.operator}_{self.order} {self.case} {self.dtype} width {self.width}"


@dataclass
class Compilation:
    """One binary to compile, and every call that needs it."""

    architecture: str
    launch: launch.Launch
    source: ASTSource
    options: dict[str, Any]
    calls: list[HostCall] = field(default_factory=list)


@dataclass(frozen=True)
class Binary:
    """The result of a compilation."""

    code: Code
    target: str  # the name the assembler was given: sm_90a
    warps: int  # more than asked for where the compiler specialises warps
    shared: int  # bytes of shared memory
    tensor_columns: int
    multiplies: bool  # the source has a matrix product


def host_function(operator: str, order: str) -> Callable[..., Any]:
    """Return ``<operator>_<order>`` of the Triton backend, called with flat arguments.

    Raises:
        ModuleNotFoundError, AttributeError: there is none.
    """
    module = importlib.import_module(f"diversevit_kernels.triton.{folder(operator)}")
    return with_flat_arguments(getattr(module, f"{operator}_{order}"))


def record(architecture: str, calls: list[HostCall]) -> tuple[list[Compilation], list[str]]:
    """Return the distinct compilations that calls need on ``architecture``, and a line per thing that went wrong."""
    found: dict[str, Compilation] = {}
    wrong: dict[str, list[HostCall]] = {}
    for call in calls:
        try:
            with device.pretend(architecture), launch.recording(run=False) as launches:
                call.call(host_function(call.operator, call.order))
            prepared = [_prepare(architecture, one) for one in launches]
        except (ModuleNotFoundError, AttributeError) as error:
            wrong.setdefault(f"missing: {error}", []).append(call)
            continue
        except Exception as error:
            wrong.setdefault(_brief(error), []).append(call)
            continue
        if not launches:
            wrong.setdefault("launches nothing", []).append(call)
        for key, compilation in prepared:
            found.setdefault(key, compilation).calls.append(call)
    lines = [f"{architecture} {_several(some)}: {reason}" for reason, some in wrong.items()]
    return list(found.values()), lines


def _several(calls: list[HostCall]) -> str:
    more = len(calls) - 1
    return f"{calls[0]}{f' and {more} more calls' if more else ''}"


def _brief(error: BaseException) -> str:
    """Return an error's type, first and last line: a compiler's first says where, its last why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"


def target_of(architecture: str) -> GPUTarget:
    chip = CHIPS[architecture]
    return GPUTarget(chip.backend, chip.arch, chip.warp_size)


def _prepare(architecture: str, one: launch.Launch) -> tuple[str, Compilation]:
    """Return a key that tells a launch's binary from others, and the compilation that Triton would do for it."""
    backend = make_backend(target_of(architecture))
    keywords = one.keywords | {"debug": False}
    kernel = one.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*one.args, **keywords)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, rest
    )
    source = ASTSource(kernel, signature, constants, attributes)
    made = Compilation(architecture, one, source, dict(parsed.__dict__))
    return f"{one.name} {source.hash()} {parsed.hash()}", made


@contextlib.contextmanager
def fresh_compilers() -> Iterator[None]:
    """Compile everything anew inside the block, and leave nothing behind in Triton's cache.

    What it writes is kept where the user set ``TRITON_CACHE_DIR``.
    """
    with contextlib.ExitStack() as stack:
        if "TRITON_CACHE_DIR" not in os.environ:
            stack.enter_context(knobs.cache.scope())
            knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(knobs.compilation.scope())
        knobs.compilation.always_compile = True
        stack.enter_context(knobs.nvidia.scope())
        knobs.nvidia.dump_ptxas_log = True
        yield


def compile_one(compilation: Compilation) -> Binary:
    """Compile, and read the machine code. To be called inside ``fresh_compilers``."""
    target = target_of(compilation.architecture)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        made = triton.compile(compilation.source, target=target, options=compilation.options)
    metadata: Any = made.metadata
    if target.backend == "cuda":
        code = read_cubin(made.asm["cubin"], metadata.name, log.getvalue())
        named = made.asm["ptx"].partition(".target ")[2].split()[0].rstrip(",")
    else:
        code = read_amdgcn(made.asm["amdgcn"], metadata.name)
        named = str(target.arch)
    return Binary(
        code=code,
        target=named,
        warps=metadata.num_warps,
        shared=metadata.shared,
        tensor_columns=getattr(metadata, "tmem_size", 0) or 0,
        multiplies="tt.dot" in made.asm["ttir"],
    )


def compile_all(compilations: list[Compilation], jobs: int) -> Iterator[tuple[int, Binary | str]]:
    """Yield results as they come, by index: a binary, or why there is none. To be called inside ``fresh_compilers``.

    ``jobs`` processes share the work; one that dies (a compiler may crash) costs only what it worked on.
    """
    _work[:] = compilations
    left = set(range(len(compilations)))
    together, alone = (jobs, sorted(left)), ((1, [i]) for i in sorted(left))
    for processes, indices in (together, *alone):
        pending = [i for i in indices if i in left]
        if not pending:
            continue
        # forked, because a launch (kernels, closures, meta tensors) cannot be pickled
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(processes, len(pending)), context) as pool:
            futures = [(i, pool.submit(_compile_index, i)) for i in pending]
            for i, future in futures:
                try:
                    result = future.result()
                except BrokenProcessPool:
                    if pending != [i]:
                        break
                    result = "the compiler crashed"
                left.remove(i)
                yield i, result


_work: list[Compilation] = []  # what forked processes find


def _compile_index(index: int) -> Binary | str:
    try:
        return compile_one(_work[index])
    except Exception as error:
        return _brief(error)
