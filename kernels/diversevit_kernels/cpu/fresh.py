"""Memory of results: uninitialised, asked of the system in large pages.

A page that is touched for the first time costs the system about a microsecond on a virtual machine, as much as a kernel
takes to fill it. Where Linux leaves the choice to programs (``transparent_hugepage`` is ``madvise``), results of
several MiB ask for pages of 2 MiB, as PyTorch's allocator does with ``THP_MEM_ALLOC_ENABLE=1``. It is a hint: it
fails silently, changes no result, and only pages that lie whole inside the result are asked for.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

WORTH = 4 << 20
"""Bytes from which it pays: less may hold no whole large page."""
_HUGE_PAGE = getattr(mmap, "MADV_HUGEPAGE", None)


def _load() -> Callable[..., Any] | None:
    if not sys.platform.startswith("linux") or _HUGE_PAGE is None:
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


_madvise = _load()


def fresh(like: Tensor, *shape: int) -> Tensor:
    """Dense memory of the device and dtype of ``like``; a kernel must write all of it."""
    made = like.new_empty(shape)
    if made.nbytes >= WORTH and _madvise is not None:
        page, first = mmap.PAGESIZE, made.data_ptr()
        begin, end = -(-first // page) * page, (first + made.nbytes) // page * page
        _madvise(begin, end - begin, _HUGE_PAGE)
    return made
