"""Collecting what happens inside a block: what this thread allocates, and which kernels it starts."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Collector(threading.local, Generic[T]):
    """Keeps what it is given while a block of this thread collects, and nothing otherwise."""

    def __init__(self):
        self._found: list[T] | None = None

    def note(self, one: T) -> None:
        if self._found is not None:
            self._found.append(one)

    @contextmanager
    def collecting(self) -> Iterator[list[T]]:
        """Give a list of what is noted inside the block."""
        before, self._found = self._found, []
        try:
            yield self._found
        finally:
            self._found = before
