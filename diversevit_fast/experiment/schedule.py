"""The learning rate of each epoch: tenfold lower after 70 % and again after 80 % of a schedule's epochs."""

from collections.abc import Sequence

DECAYS = (0.7, 0.8)
"""Fractions of a schedule's epochs after which the learning rate falls tenfold."""

Factors = tuple[tuple[int, float], ...]
"""``(first epoch, factor)``: what the initial learning rate is multiplied by from that epoch on, in order."""


def learning_rate(base: float, epoch: int, epochs: int) -> float:
    """Return the learning rate of epoch ``epoch`` (the first is 1) by a schedule of ``epochs``."""
    return base * 0.1 ** sum(epoch > round(fraction * epochs) for fraction in DECAYS)


def factors(schedule: int, epochs: int) -> Factors:
    """Return the factors of ``epochs`` epochs by a schedule of ``schedule`` epochs."""
    starts = sorted({1, *(round(fraction * schedule) + 1 for fraction in DECAYS)})
    found = [(start, _factor(start, schedule)) for start in starts]
    return _shortest(found, epochs)


def continued(before: Factors, done: int, schedule: int, epochs: int) -> Factors:
    """Return the factors where ``done`` epochs had those of ``before`` and the rest has those of a schedule."""
    first = done + 1
    rest = [(first, _factor(first, schedule))]
    rest += [change for change in factors(schedule, epochs) if change[0] > first]
    return _shortest([*(change for change in before if change[0] <= done), *rest], epochs)


def in_words(changes: Factors) -> str:
    """Return the factors as words that follow "learning rate 0.001"."""
    falls = [f"times {factor:g} from epoch {start}" for start, factor in changes[1:]]
    return ", ".join(falls) or "the same in every epoch"


def _factor(epoch: int, schedule: int) -> float:
    return round(learning_rate(1.0, epoch, schedule), 6)


def _shortest(changes: Sequence[tuple[int, float]], epochs: int) -> Factors:
    """Drop changes that change nothing, or come after the last epoch."""
    kept: list[tuple[int, float]] = []
    for start, factor in changes:
        if start <= epochs and (not kept or kept[-1][1] != factor):
            kept.append((start, factor))
    return tuple(kept)
