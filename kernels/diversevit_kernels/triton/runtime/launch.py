"""Running kernels, and recording launches for tools.

Every launch of the package goes through ``run_kernel``. The compile report records launches on meta tensors
instead of running them; the roofline counts what each launch loads and stores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import triton

from .autotune import tuned
from .collector import Collector
from .device import INTERPRETED, autotuning
from .plan import Configuration, Grid, Plan


@dataclass(frozen=True)
class Launch:
    """One launch: what ``kernel[grid](*args, **constants, num_warps=..., num_stages=...)`` is called with."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    configuration: Configuration

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords that the kernel is called with."""
        return {**known(self.constants), **self.configuration.keywords}


_record: list[Launch] | None = None
_running = True


@contextmanager
def recording(run: bool) -> Iterator[list[Launch]]:
    """Collect the launches of the block; with ``run=False`` none is started (meta tensors will do)."""
    global _record, _running
    before = _record, _running
    _record, _running = [], run
    try:
        yield _record
    finally:
        _record, _running = before


def watched() -> bool:
    """Whether launches are recorded for a tool."""
    return _record is not None


class Started(NamedTuple):
    """A launch that was started: the compiled kernel, the number of programs, the arguments before its constants."""

    compiled: Any
    programs: int
    args: tuple[Any, ...]


starts = Collector[Started]()


def run_kernel(plan: Plan, kernel: Any, grid: Grid, *args: Any, **constants: Any) -> None:
    """Start ``kernel`` as planned.

    Args:
        grid: the number of programs under a configuration. 0 starts nothing.
        constants: constexpr arguments besides the configuration's tile sizes.
    """
    chosen = plan.configuration
    if autotuning() and _running and grid(chosen):
        chosen = tuned(plan, kernel, grid, args, known(constants))
    programs = grid(chosen)
    if _record is not None:
        everything = {**constants, **dict(chosen.tiles)}
        _record.append(Launch(plan.table.name, kernel, (programs,), args, everything, chosen))
    if programs and _running:
        compiled = kernel[(programs,)](*args, **known(constants), **chosen.keywords)
        starts.note(Started(compiled, programs, args))


_SEES_CONSTANTS = INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def known(constants: dict[str, Any]) -> dict[str, Any]:
    """``constants``, every value of a bundle marked as one: Triton before 3.8 does not see that they are."""
    if _SEES_CONSTANTS:
        return constants
    return {k: _marked(x) if hasattr(x, "_fields") else x for k, x in constants.items()}


@cache
def _marked(bundle: Any) -> Any:
    return type(bundle)(*map(_constant, bundle))


def _constant(x: Any) -> Any:
    return triton.language.constexpr(tuple(map(_constant, x)) if isinstance(x, tuple) else x)
