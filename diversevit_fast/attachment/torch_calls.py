"""The torch calls that an attachment sees, from the first moment it needs them.

Every call that a ``TorchFunctionMode`` sees costs microseconds of Python, so an attachment's mode is not entered with
its ``with`` block but when its first layer runs. It then takes the place among the other modes that it would have had:
above those that were entered before the block, below those that were entered inside it.
"""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def _opened() -> list[TorchCalls]:
    """Those whose block is open on this thread, the outermost first."""
    if not hasattr(_thread, "opened"):
        _thread.opened = []
    return _thread.opened


def open_attachments() -> list[Any]:
    """The attachments whose block is open on this thread, the outermost first."""
    return [calls.owner for calls in _opened()]
