"""Choosing a launch configuration by measurement, for those who ask: once for each kind of launch."""

from collections.abc import Callable, Sequence

from .configurations import Configuration


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
