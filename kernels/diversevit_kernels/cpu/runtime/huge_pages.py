"""Memory of results: in large pages, and kept when a result dies, for the next one of its size.

A page that is touched for the first time costs the system about a microsecond on a virtual machine, as much as a kernel
takes to fill it, and PyTorch's allocator on a CPU hands large tensors back to the system. Here a result of ``WORTH``
bytes or more lies in a mapping of its own. When its storage is freed, on any thread, the mapping waits for the next
result of the same size, the one freed last first: its pages are there and may still be in the cache. Up to ``KEPT``
bytes wait; beyond, those that have waited longest go back to the system, and ``release`` gives back all.

A block is private to the process (a fork gets copies of its pages) and cannot be resized by PyTorch. Elsewhere than on
Linux results are PyTorch's own.
"""

import ctypes
import math
import mmap
import sys
from collections import deque
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from ...common.forks import ForkSafe

WORTH = 1 << 20
"""Bytes from which a result is pooled. Less comes from the heap, whose pages stay."""
KEPT = 256 << 20
"""Bytes that may wait."""
_GRAIN = 1 << 16
"""Sizes are multiples of it, so that almost equal ones share."""
_ENABLED = sys.platform.startswith("linux")
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)

_waiting: list[mmap.mmap] = []  # guarded by _guard; the one freed last is last
_freed: deque[mmap.mmap] = deque()  # on their way to _waiting: a finalizer must not wait for a lock
_guard = ForkSafe()


def pooled(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised dense memory of the device and dtype of ``like``; a kernel must write all of it."""
    numel = math.prod(shape)
    size = -(-numel * like.itemsize // _GRAIN) * _GRAIN
    if size < WORTH or not _ENABLED:
        return like.new_empty(shape)
    block = _taken(size) or _mapped(size)
    if block is None:
        return like.new_empty(shape)  # and its error, if there is no memory at all
    lease = _lease_of(size).from_buffer(block)
    lease.block = block
    return torch.frombuffer(lease, dtype=like.dtype, count=numel).resize_(shape)


class _Lease(ctypes.Array):
    """A block while a storage holds it: PyTorch drops it with the storage, on any thread."""

    _type_ = ctypes.c_char  # pyright: ignore[reportAssignmentType]
    _length_ = 0  # pyright: ignore[reportAssignmentType]
    block: mmap.mmap

    def __del__(self):
        _give_back(self.block)


@cache
def _lease_of(size: int) -> type[_Lease]:
    return type("_Lease", (_Lease,), {"_type_": ctypes.c_char, "_length_": size})


def release() -> None:
    """Give all memory that waits back to the system."""
    with _guard.lock:
        _freed.clear()
        _waiting.clear()


def waiting() -> int:
    """Bytes that wait for a result."""
    with _guard.lock:
        _tidy()
        return sum(map(len, _waiting))


def _taken(size: int) -> mmap.mmap | None:
    with _guard.lock:
        _tidy()
        for i in reversed(range(len(_waiting))):
            if len(_waiting[i]) == size:
                return _waiting.pop(i)
    return None


def _mapped(size: int) -> mmap.mmap | None:
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    if _HUGE_PAGES is not None:
        with suppress(OSError):  # a hint: a system built without them
            block.madvise(_HUGE_PAGES)
    return block


def _give_back(block: mmap.mmap) -> None:
    """A result's storage is freed. This may interrupt any thread, one inside the lock too: then that one tidies."""
    _freed.append(block)
    lock = _guard.lock
    if lock.acquire(blocking=False):
        try:
            _tidy()
        finally:
            lock.release()


def _tidy() -> None:
    """Under the lock: what was freed waits, and what is too much goes back to the system."""
    while _freed:
        _waiting.append(_freed.popleft())
    while sum(map(len, _waiting)) > KEPT:
        _waiting.pop(0)
