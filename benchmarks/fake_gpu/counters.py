"""What the fake GPU counted, read in the process that runs on it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from .build import LIBRARY


@cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL(LIBRARY)
    library.fake_gpu_counter_name.restype = ctypes.c_char_p
    return library


@cache
def names() -> tuple[str, ...]:
    """Names of the counters; ``csrc/fake_gpu.h`` says what each counts."""
    found = []
    while name := _driver().fake_gpu_counter_name(len(found)):
        found.append(name.decode())
    return tuple(found)


def counts() -> dict[str, int]:
    """Return every counter since the process began."""
    values = (ctypes.c_long * len(names()))()
    _driver().fake_gpu_counts(values)
    return dict(zip(names(), values, strict=True))


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Give a dictionary that holds, after the block, what was counted in it."""
    before, found = counts(), {}
    yield found
    found.update({name: after - before[name] for name, after in counts().items()})
