"""Read indices of heads and layers: Python's and NumPy's integers, arrays, tensors, any collection.

Booleans are refused everywhere: whoever writes ``[True, False]`` means a mask, but as indices they would
be heads 1 and 0.
"""

import operator
import reprlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, SupportsIndex

Integers = SupportsIndex | Iterable[SupportsIndex]
"""One integer, or several: a list, a set, a range, an array, a tensor, a generator."""


def whole_number(value: Any) -> int | None:
    """Convert an integer (Python's, NumPy's, a tensor without axes) to ``int``; None for anything else."""
    if is_boolean(value) or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without data
        return None


def is_boolean(value: Any) -> bool:
    """True if ``value`` is a boolean, or an array or tensor of booleans."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def as_list(values: Any, limit: int) -> list[Any] | None:
    """List the items of ``values``, or ``values`` itself if it is one integer; None if it is neither.

    At most ``limit + 1`` items are read, since a range or a generator may be endless: so many cannot be
    different indices below ``limit``.
    """
    if whole_number(values) is not None:
        return [values]
    if isinstance(values, (str, bytes, bytearray, Mapping)):
        return None
    try:
        return list(islice(values, limit + 1))
    except TypeError:  # not iterable
        return None


def describe(values: Any) -> str:
    """Format ``values`` for an error message: integers of all types alike, long lists cut."""
    if not isinstance(values, list):
        return reprlib.repr(values)
    numbers = [whole_number(value) for value in values]
    return reprlib.repr([v if n is None else n for v, n in zip(values, numbers, strict=True)])
