"""Caching allocator for results: huge pages, kept when a result is freed and reused by the next one of its size.

Why   The first touch of a page costs the system about a microsecond on a virtual machine, as much as a kernel takes to
      fill it, and PyTorch's CPU allocator returns large tensors to the system as soon as they are freed.
How   A result of ``MIN_BYTES`` or more gets a memory mapping of its own, a *block*. When its storage is freed, on any
      thread, the block goes into the cache, from which the next result of the same size takes the most recently freed
      one: its pages exist and may still be in the processor's cache. When the cache exceeds ``MAX_CACHED_BYTES``, its
      oldest blocks are unmapped; ``empty_cache`` unmaps all of them.
Not   PyTorch cannot resize a tensor in a block. After a fork parent and child write to pages of their own. On systems
      other than Linux all results come from PyTorch.
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

MIN_BYTES = 1 << 20
"""Smaller results come from PyTorch, that is from the heap, which keeps their pages anyway."""
MAX_CACHED_BYTES = 256 << 20
"""Limit of what the cache holds; memory of live results does not count."""
_BLOCK_MULTIPLE = 1 << 16
"""Block sizes are rounded up to a multiple of this, so that results of almost equal size share blocks."""
_ENABLED = sys.platform.startswith("linux")
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)

_cached: list[mmap.mmap] = []  # guarded by _guard; the most recently freed block is last
_freed: deque[mmap.mmap] = deque()  # on their way to _cached: a finalizer must not wait for a lock
_guard = ForkSafe()


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised contiguous tensor of ``shape``, with the device and dtype of ``like``."""
    numel = math.prod(shape)
    size = -(-numel * like.itemsize // _BLOCK_MULTIPLE) * _BLOCK_MULTIPLE
    if size < MIN_BYTES or not _ENABLED:
        return like.new_empty(shape)
    block = _take_cached(size) or _map_block(size)
    if block is None:
        return like.new_empty(shape)  # which raises if there is no memory at all
    owner = _owner_type(size).from_buffer(block)
    owner.block = block
    return torch.frombuffer(owner, dtype=like.dtype, count=numel).resize_(shape)


def new_empty_heads(like: Tensor, width: int) -> Tensor:
    """Uninitialised ``[B, H, N, width]`` stored as ``[B, N, H, width]``, the layout that a projection reads."""
    B, H, N, _ = like.shape
    return new_empty(like, B, N, H, width).transpose(1, 2)


def empty_cache() -> None:
    """Unmap all cached blocks; memory of live tensors is not touched."""
    with _guard.lock:
        _freed.clear()
        _cached.clear()


def cached_bytes() -> int:
    """Bytes of the blocks that are free and cached for reuse."""
    with _guard.lock:
        _collect_freed()
        return sum(map(len, _cached))


class _BlockOwner(ctypes.Array):
    """Buffer that a storage holds on to: dropped with the storage, on any thread, it puts its block into the cache."""

    _type_ = ctypes.c_char  # pyright: ignore[reportAssignmentType]
    _length_ = 0  # pyright: ignore[reportAssignmentType]
    block: mmap.mmap

    def __del__(self):
        _free(self.block)


@cache
def _owner_type(size: int) -> type[_BlockOwner]:
    return type("_BlockOwner", (_BlockOwner,), {"_type_": ctypes.c_char, "_length_": size})


def _take_cached(size: int) -> mmap.mmap | None:
    with _guard.lock:
        _collect_freed()
        for i in reversed(range(len(_cached))):
            if len(_cached[i]) == size:
                return _cached.pop(i)
    return None


def _map_block(size: int) -> mmap.mmap | None:
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    if _HUGE_PAGES is not None:
        with suppress(OSError):  # only advice: some kernels are built without huge pages
            block.madvise(_HUGE_PAGES)
    return block


def _free(block: mmap.mmap) -> None:
    """Put the block of a freed storage into the cache.

    Called by finalizers, which may interrupt any thread, even one that holds the lock: then that thread, or the next
    one that takes the lock, moves the block.
    """
    _freed.append(block)
    lock = _guard.lock
    if lock.acquire(blocking=False):
        try:
            _collect_freed()
        finally:
            lock.release()


def _collect_freed() -> None:
    """Move freed blocks into the cache and unmap the oldest ones above the limit; the caller holds the lock."""
    while _freed:
        _cached.append(_freed.popleft())
    while sum(map(len, _cached)) > MAX_CACHED_BYTES:
        _cached.pop(0)
