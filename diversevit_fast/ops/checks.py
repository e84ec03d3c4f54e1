"""Argument checks that several operators share. Each failure is one line (see ``errors``)."""

import torch
from torch import Tensor

from ..errors import UsageError, usage_error


def check_tensor(name: str, x: object) -> Tensor:
    """Return ``x`` if it is a dense floating tensor.

    Raises:
        UsageError: not a tensor, not floating, or neither strided nor plain.
    """
    if not isinstance(x, Tensor):
        raise usage_error(name, "a tensor", type(x).__name__, "convert it with torch.as_tensor")
    if not x.is_floating_point():
        raise usage_error(name, "a floating dtype", x.dtype, f"convert it with {name}.float()")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout)
        raise usage_error(name, "a dense strided tensor", layout, "convert it with to_dense()")
    return x


def check_alike(**tensors: Tensor | None) -> None:
    """Check that every tensor given has the first one's dtype and device.

    Raises:
        UsageError: naming the first that differs.
    """
    (name, first), *rest = ((n, x) for n, x in tensors.items() if x is not None)
    for other, x in rest:
        if x.dtype != first.dtype:
            raise usage_error(
                other, f"dtype {first.dtype} like {name}", x.dtype, "cast one of them"
            )
        if x.device != first.device:
            raise usage_error(
                other, f"device {first.device} like {name}", x.device, "move one of them"
            )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        UsageError: it is not.
    """
    if value not in choices:
        wanted = "one of " + ", ".join(map(repr, choices))
        raise usage_error(name, wanted, repr(value), "check the spelling")


def shape_error(name: str, wanted: str, x: Tensor, hint: str) -> UsageError:
    """Build the error for a tensor of the wrong shape."""
    return usage_error(name, f"shape {wanted}", list(x.shape), hint)
