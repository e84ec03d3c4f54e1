"""What the host functions launch, compiled ahead of time for chips that are not here.

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
from tools.kernel_analysis.operators import folder


@dataclass(frozen=True)
class Workload:
    """One call of a host function. ``call`` gets the function and calls it on meta tensors."""

    stage: str
    rung: str  # forward, backward, double_backward
    case: str  # "plain [8, 12, 197, .]"
    dtype: str
    width: int  # what the launch table is keyed by: head width, or features
    call: Callable[[Callable[..., Any]], object]
    binding: bool = True  # whether the verdicts on registers and tensor cores apply

    def __str__(self) -> str:
        return f"{self.stage}_{self.rung} {self.case} {self.dtype} width {self.width}"


@dataclass
class Compilation:
    """One binary, and every workload that needs it."""

    architecture: str
    launch: launch.Launch
    source: ASTSource
    options: dict[str, Any]
    workloads: list[Workload] = field(default_factory=list)


@dataclass(frozen=True)
class Binary:
    """What became of a compilation."""

    code: Code
    target: str  # the name the assembler was given: sm_90a
    warps: int  # more than asked for where the compiler specialises warps
    shared: int  # bytes of shared memory
    tensor_columns: int
    multiplies: bool  # the source has a matrix product


def host_function(stage: str, rung: str) -> Callable[..., Any]:
    """``<stage>_<rung>`` of the Triton backend.

    Raises:
        ModuleNotFoundError, AttributeError: there is none.
    """
    module = importlib.import_module(f"diversevit_kernels.triton.{folder(stage)}")
    return getattr(module, f"{stage}_{rung}")


def record(architecture: str, workloads: list[Workload]) -> tuple[list[Compilation], list[str]]:
    """Distinct compilations that the workloads need on ``architecture``, and a line per thing that went wrong."""
    found: dict[str, Compilation] = {}
    wrong: dict[str, list[Workload]] = {}
    for workload in workloads:
        try:
            with device.pretend(architecture), launch.recording(run=False) as launches:
                workload.call(host_function(workload.stage, workload.rung))
            prepared = [_prepare(architecture, one) for one in launches]
        except (ModuleNotFoundError, AttributeError) as error:
            wrong.setdefault(f"missing: {error}", []).append(workload)
            continue
        except Exception as error:
            wrong.setdefault(_brief(error), []).append(workload)
            continue
        if not launches:
            wrong.setdefault("launches nothing", []).append(workload)
        for key, compilation in prepared:
            found.setdefault(key, compilation).workloads.append(workload)
    lines = [f"{architecture} {_several(some)}: {reason}" for reason, some in wrong.items()]
    return list(found.values()), lines


def _several(workloads: list[Workload]) -> str:
    more = len(workloads) - 1
    return f"{workloads[0]}{f' and {more} more calls' if more else ''}"


def _brief(error: BaseException) -> str:
    """Type, first and last line: a compiler's first says where, its last why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"


def target_of(architecture: str) -> GPUTarget:
    chip = CHIPS[architecture]
    return GPUTarget(chip.backend, chip.arch, chip.warp_size)


def _prepare(architecture: str, one: launch.Launch) -> tuple[str, Compilation]:
    """A launch as Triton's just-in-time path sees it, and what tells its binary from others."""
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
    """Inside the block nothing is read from Triton's cache, and what it writes is thrown away.

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
    """Compile and read. To be called inside ``fresh_compilers``."""
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
    """Results as they come, by index: a binary, or why there is none. To be called inside ``fresh_compilers``.

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
