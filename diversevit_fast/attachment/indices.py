"""Heads and layers as people have them: Python's and NumPy's integers, what ``topk`` and ``argsort`` give.

Booleans are refused everywhere: ``[True, False]`` is a mask to whoever writes it, and heads 1 and 0 to
whoever reads it.
"""

import operator
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, SupportsIndex

Integers = SupportsIndex | Iterable[SupportsIndex]
"""One integer, or several: a list, a set, a range, an array, a tensor, a generator."""


def whole_number(value: Any) -> int | None:
    """An integer, also NumPy's or a tensor without axes; None for anything else."""
    if is_boolean(value) or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: of a tensor without data
        return None


def is_boolean(value: Any) -> bool:
    """Whether ``value`` is a boolean, or an array or tensor of them."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def listed(values: Any, limit: int) -> list[Any] | None:
    """The items of ``values``, or its only one, at most ``limit + 1``; None if it holds no integers.

    More than ``limit`` different integers below ``limit`` there are not, so the rest need not be seen: a
    range or a generator may be endless.
    """
    if whole_number(values) is not None:
        return [values]
    if isinstance(values, (str, bytes, bytearray, Mapping)):
        return None
    try:
        return list(islice(values, limit + 1))
    except TypeError:  # not iterable
        return None


def shown(values: Any) -> str:
    """What was given, for an error's one line: integers as they are meant, long lists cut."""
    if not isinstance(values, list):
        return reprlib.repr(values)
    numbers = [whole_number(value) for value in values]
    return reprlib.repr([v if n is None else n for v, n in zip(values, numbers, strict=True)])
