"""Starting kernels and allocating their results, so that tools can watch both.

Every launch of the package goes through ``launch`` and every result through ``allocate``. The compile
report records launches on meta tensors instead of running them; the tests put guard zones around
results; the roofline counts what each launch loads and stores.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .autotune import fastest
from .configurations import (
    INTERPRETED,
    Configuration,
    autotuning,
    candidates,
    configuration,
    options,
    shared_memory,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Launch:
    """One launch: what ``kernel[grid](*args, **constants, num_warps=..., num_stages=...)`` is called with."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    configuration: Configuration


_record: list[Launch] | None = None
_running = True
allocator: Callable[..., Tensor] = torch.empty
"""What ``allocate`` calls: tests replace it by one that poisons and guards."""


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


def launch(
    name: str,
    kernel: Any,
    grid: Callable[[Configuration], int],
    like: Tensor,
    width: int,
    *args: Any,
    **constants: Any,
) -> None:
    """Start ``kernel`` with the table's configuration for (``name``, dtype and device of ``like``, ``width``).

    Args:
        grid: the number of programs under a configuration. 0 starts nothing.
        constants: constexpr arguments besides the configuration's tile sizes.
    """
    chosen = configuration(name, like, width)
    if autotuning() and _running and grid(chosen):
        chosen = _tuned(name, kernel, grid, like, width, args, constants)
    programs = grid(chosen)
    if _record is not None:
        everything = {**constants, **dict(chosen.tiles)}
        _record.append(Launch(name, kernel, (programs,), args, everything, chosen))
    if programs and _running:
        kernel[(programs,)](*args, **keywords(constants, chosen, like))


def keywords(constants: dict[str, Any], chosen: Configuration, like: Tensor) -> dict[str, Any]:
    """What a kernel is called with besides its arguments."""
    return {
        **{name: _known(x) for name, x in constants.items()},
        **dict(chosen.tiles),
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        **options(like),
    }


_SEES_CONSTANTS = INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def _known(constant: Any) -> Any:
    """A kernel's ``Constants``, each value marked as a constant: Triton before 3.8 does not see that they are."""
    return constant if _SEES_CONSTANTS or not hasattr(constant, "_fields") else _marked(constant)


@cache
def _marked(static: Any) -> Any:
    return type(static)(*map(_constant, static))


def _constant(x: Any) -> Any:
    return triton.language.constexpr(tuple(map(_constant, x)) if isinstance(x, tuple) else x)


_measured: dict[tuple[Any, ...], Configuration] = {}


def _tuned(
    name: str,
    kernel: Any,
    grid: Callable[[Configuration], int],
    like: Tensor,
    width: int,
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> Configuration:
    """The fastest configuration for this kind of launch; running a kernel twice gives the same results."""
    key = (name, like.device, like.dtype, like.shape, width, *sorted(map(str, constants.items())))
    if key not in _measured:

        def run(c: Configuration) -> None:
            kernel[(grid(c),)](*args, **keywords(constants, c, like))

        def shared(c: Configuration) -> int:
            made = kernel.warmup(*args, grid=(grid(c),), **keywords(constants, c, like))
            return made.metadata.shared

        _measured[key] = fastest(
            candidates(name, like, width),
            shared,
            shared_memory(like.device),
            lambda c: triton.testing.do_bench(lambda: run(c), return_mode="median"),
        )
    return _measured[key]


def allocate(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Uninitialised dense memory on the device of ``like``; a kernel must write all of it."""
    return allocator(shape, dtype=dtype, device=like.device)


def check_operand(name: str, x: Tensor) -> None:
    """Refuse what no kernel takes, in one line, before any launch.

    Raises:
        NotImplementedError: a dtype, device or layout without a kernel.
    """
    if x.dtype not in DTYPES:
        raise NotImplementedError(
            f"{name}: Triton kernels take float16, bfloat16, float32 or float64, not {x.dtype}"
        )
    if x.layout != torch.strided or x.is_nested:
        raise NotImplementedError(f"{name}: Triton kernels take strided tensors, not {x.layout}")


def reach(x: Tensor, first_axis: int = 0) -> int:
    """The largest offset that the axes from ``first_axis`` on can make."""
    farthest = 0
    for size, step in zip(x.shape[first_axis:], x.stride()[first_axis:], strict=True):
        farthest += (size - 1) * abs(step)
    return farthest


def cdiv(a: int, b: int) -> int:
    """Tiles of size ``b`` that cover ``a``."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def split_width(width: int) -> tuple[int, ...]:
    """Tile widths, powers of two and at least 16, that cover ``width``.

    One piece, or three of a quarter each where those suffice. All are equal, so that one register layout serves them
    all; more and smaller ones cost more registers than their padding saves (the compile report: five of 16 spill in
    float32). ``64 -> (64,)``, ``72 -> 3 x 32``, ``80 -> 3 x 32``, ``104 -> (128,)``, ``256 -> (256,)``.
    """
    whole = max(16, power_of_two(width))
    quarter = whole // 4
    return (quarter,) * 3 if quarter >= 16 and width <= 3 * quarter else (whole,)
