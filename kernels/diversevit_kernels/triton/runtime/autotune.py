"""Choosing a launch configuration by measurement, for those who ask: once for each kind of launch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import triton
from torch import Tensor

from .device import shared_memory
from .plan import Configuration, Grid, Plan

_measured: dict[tuple[Any, ...], Configuration] = {}


def tuned(
    plan: Plan, kernel: Any, grid: Grid, args: tuple[Any, ...], constants: dict[str, Any]
) -> Configuration:
    """The fastest configuration for this kind of launch; running a kernel twice gives the same results."""
    tensors = list(tensors_of(args))
    kinds = ((x.device, x.dtype, x.shape) for x in tensors)
    key = (plan.table.name, *kinds, *sorted(map(str, constants.items())))
    if key not in _measured:

        def run(c: Configuration) -> None:
            kernel[(grid(c),)](*args, **constants, **c.keywords)

        def shared(c: Configuration) -> int:
            made = kernel.warmup(*args, grid=(grid(c),), **constants, **c.keywords)
            return made.metadata.shared

        _measured[key] = fastest(
            plan.candidates(),
            shared,
            shared_memory(tensors[0].device),
            lambda c: triton.testing.do_bench(lambda: run(c), return_mode="median"),
        )
    return _measured[key]


def tensors_of(args: Any) -> Iterator[Tensor]:
    """The tensors of a launch, those inside its tuples too."""
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from tensors_of(x)


def fastest(
    candidates: Sequence[Configuration],
    shared: Callable[[Configuration], int],
    limit: int,
    seconds: Callable[[Configuration], float],
) -> Configuration:
    """The quickest of the candidates whose shared memory fits; the first of them on a tie.

    Args:
        shared: bytes of shared memory of a candidate, known once it is compiled.
        limit: bytes that a program may have.
        seconds: a candidate's time; called only for those that fit.

    Raises:
        NotImplementedError: none fits.
    """
    fitting = [c for c in candidates if shared(c) <= limit]
    if not fitting:
        raise NotImplementedError(
            f"autotuning: none of {len(candidates)} candidates fits {limit} bytes of shared memory"
        )
    return min(fitting, key=seconds)
