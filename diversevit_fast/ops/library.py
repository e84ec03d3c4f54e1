"""``torch.library`` operators in this library's namespace, whose functions run a backend's kernels."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedError


def operator(
    name: str, inputs: type[tuple[Any, ...]] | None = None
) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Make ``diversevit::<name>`` of a function that writes into none of its arguments.

    Autocast is off inside: a kernel decides its own precision. What a kernel refuses (``NotImplementedError``) names
    the backend that runs anything.

    Args:
        name: in the namespace ``diversevit``.
        inputs: a named tuple with the operator's arguments; the function then takes ``*inputs``. Without it the
            arguments are the function's own.
    """

    def define(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            device = args[0].device.type
            try:
                if not torch.is_autocast_enabled(device):
                    return function(*args)
                with torch.autocast(device, enabled=False):
                    return function(*args)
            except NotImplementedError as refusal:
                hint = "dvf.use_backend('reference') runs anything"
                raise UnsupportedError(f"{refusal}; {hint}") from None

        if inputs is not None:
            own = inspect.signature(function)
            run.__signature__ = inspect.signature(inputs).replace(  # pyright: ignore
                return_annotation=own.return_annotation
            )
        return torch.library.custom_op(f"diversevit::{name}", run, mutates_args=())

    return define
