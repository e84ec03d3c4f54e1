"""``torch.library`` operators in this library's namespace, whose functions run a backend's kernels."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedError


def operator(name: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Make ``diversevit::<name>`` of a function that writes into none of its arguments.

    Of a function that takes one named tuple the operator's arguments are the tuple's fields.

    Autocast is off inside: a kernel decides its own precision. What a kernel refuses (``NotImplementedError``) names
    the backend that runs anything.
    """

    def define(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        inputs = named_inputs(function)

        def run(*args: Any) -> Any:
            given = args if inputs is None else (inputs._make(args),)
            device = args[0].device.type
            try:
                if not torch.is_autocast_enabled(device):
                    return function(*given)
                with torch.autocast(device, enabled=False):
                    return function(*given)
            except NotImplementedError as refusal:
                hint = "dvf.use_backend('reference') runs anything"
                raise UnsupportedError(f"{refusal}; {hint}") from None

        own = inspect.signature(function)
        taken = own if inputs is None else inspect.signature(inputs)
        run.__signature__ = taken.replace(  # pyright: ignore[reportFunctionMemberAccess]
            return_annotation=own.return_annotation
        )
        run.__doc__ = function.__doc__
        return torch.library.custom_op(f"diversevit::{name}", run, mutates_args=())

    return define


def named_inputs(function: Callable[..., Any]) -> Any:
    """The named tuple that is the first argument of ``function``, or None."""
    first: Any = next(iter(inspect.signature(function).parameters.values())).annotation
    return first if isinstance(first, type) and hasattr(first, "_fields") else None
