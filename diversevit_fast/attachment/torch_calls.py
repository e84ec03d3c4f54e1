"""The torch calls that an attachment sees, from the first moment it needs them.

Every call that a ``TorchFunctionMode`` sees costs microseconds of Python, so an attachment's mode is not entered with
its ``with`` block but when its first layer runs. It then takes the place among the other modes that it would have had:
above those that were entered before the block, below those that were entered inside it.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .._torch_internals import (
    default_device_mode,
    function_modes,
    insert_function_mode,
    remove_function_mode,
)

Forward = Callable[..., Any]
Handler = Callable[[Any, Forward, tuple[Any, ...], dict[str, Any]], Any]
"""Called with an attachment and a torch function with its arguments; returns what the function should."""

_numbers = itertools.count()
_thread = threading.local()


class TorchCalls(TorchFunctionMode):
    """Passes the calls of some torch functions to an attachment.

    The attachment is not a mode itself: a compiler would not trace its ``__enter__``.
    """

    def __init__(self, owner: Any, handlers: Mapping[Forward, Handler]):
        super().__init__()
        self.owner, self.handlers = owner, handlers
        self.started = False
        self.paused = False  # see ``paused``
        self._number, self._below = 0, []

    def __torch_function__(
        self,
        func: Forward,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handler = self.handlers.get(func)
        if handler is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return handler(self.owner, func, args, kwargs or {})

    def open(self) -> None:
        """Note that the owner's block begins here."""
        self._number, self._below = next(_numbers), function_modes()
        _opened().append(self)

    def start(self) -> bool:
        """See calls from now on; returns whether it did not already."""
        if self.started:
            return False
        entered = function_modes()
        below = (i for i, mode in enumerate(entered) if self._belongs_above(mode))
        insert_function_mode(self, max(below, default=-1) + 1)
        self.started = True
        return True

    def _belongs_above(self, mode: TorchFunctionMode) -> bool:
        if isinstance(mode, TorchCalls):
            return mode._number < self._number
        return mode is default_device_mode() or any(mode is x for x in self._below)

    def sees_first(self) -> bool:
        """Whether calls come here before any other mode sees them, or would if they were seen."""
        entered = function_modes()
        return entered[-1] is self if self.started else len(entered) == len(self._below)

    def sees_alone(self) -> bool:
        """Whether no other mode sees calls."""
        return len(function_modes()) == self.started

    def stop(self) -> None:
        """See no more calls."""
        if self.started:
            remove_function_mode(self)
        self.started = False

    def close(self) -> None:
        """Note that the owner's block ends here, in whatever order blocks end."""
        self.stop()
        self._below = []
        if self in _opened():
            _opened().remove(self)


def this_thread() -> int:
    """The current thread's number; 0 under a compiler, which cannot trace it."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _opened() -> list[TorchCalls]:
    """Those whose block is open on this thread, the outermost first."""
    if not hasattr(_thread, "opened"):
        _thread.opened = []
    return _thread.opened


def open_attachments() -> list[Any]:
    """The attachments whose block is open on this thread and not paused, the outermost first."""
    return [calls.owner for calls in _opened() if not calls.paused]


def in_second_order() -> bool:
    """Whether a block of ``dvf.second_order`` is open on this thread."""
    return any(getattr(owner, "everywhere", False) for owner in open_attachments())


@contextmanager
def paused() -> Iterator[None]:
    """A context inside which the blocks that are open on this thread see nothing."""
    before = [(calls, calls.started) for calls in _opened() if not calls.paused]
    for calls, _ in before:
        calls.stop()
        calls.paused = True
    try:
        yield
    finally:
        for calls, started in before:
            calls.paused = False
            if started and calls in _opened():
                calls.start()
