"""Locks and threads after a fork: a child has the memory of every thread and runs only the one that forked.

A lock that another thread held stays locked for ever in the child, and so would the child. Threads of OpenMP are gone
there too, but the runtime goes on waiting for them.
"""

import os
import warnings
from collections.abc import Callable
from threading import Lock

import torch


def after_fork_in_child(function: Callable[[], None]) -> None:
    """Have ``function`` called first thing in every forked child."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=function)


class ForkSafe:
    """Holds a lock that is open in a forked child, whoever held it: ``with guard.lock:``.

    The child has a new lock, and a block that was entered before the fork leaves the old one. What is guarded must
    be whole at every moment, not only while the lock is open: the child may find it half-way through a block.
    """

    def __init__(self):
        self.lock = Lock()
        after_fork_in_child(self._renew)

    def _renew(self) -> None:
        self.lock = Lock()


_parallel = False  # this process, or the one it was forked from, has run kernels on several threads
_forked = False  # after that


def kernel_threads() -> int:
    """The number of threads that a kernel may run on: PyTorch's, or 1 where OpenMP's threads were lost in a fork."""
    global _parallel
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    if _forked:
        _warn_of_fork()
        return 1
    _parallel = True
    return threads


def _note_fork() -> None:
    global _forked
    _forked = _forked or _parallel


_warned = False


def _warn_of_fork() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "diversevit: this process was forked from one that had computed on several threads, which OpenMP "
            "does not survive: kernels run on one thread here, and PyTorch's own operators may hang; call "
            "torch.set_num_threads(1) first, or start processes with 'spawn'",
            stacklevel=4,
        )


after_fork_in_child(_note_fork)
