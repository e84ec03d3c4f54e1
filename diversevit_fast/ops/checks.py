"""Argument checks that several operators share. Each failure is one line (see ``errors``)."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from diversevit_kernels.common.torch_internals import likeness

from .._torch_internals import dispatch_modes
from ..errors import UsageError, usage_error

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias


def check_tensor(name: str, x: object) -> Tensor:
    """Return ``x`` if it is a dense floating tensor.

    Raises:
        UsageError: not a tensor, not floating, or neither strided nor plain.
    """
    if not isinstance(x, Tensor):
        raise usage_error(name, "a tensor", type(x).__name__, "convert it with torch.as_tensor")
    if not x.is_floating_point():
        raise usage_error(name, "a floating dtype", x.dtype, f"convert it with {name}.float()")
    if x.is_nested:
        hint = (
            "PyTorch's nested tensors have one derivative: pack plain tensors for flash_attn_varlen_func of "
            "diversevit_fast.integrations.flash_attn, or pad them and pass a mask"
        )
        raise usage_error(name, "a dense strided tensor", "nested", hint)
    if x.layout != torch.strided:
        raise usage_error(name, "a dense strided tensor", x.layout, "convert it with to_dense()")
    return x


def is_causal_bias(mask: object) -> TypeGuard["CausalBias"]:
    """Whether a mask is PyTorch's ``CausalBias``, whose module is slow to import and not imported for asking."""
    bias: Any = sys.modules.get("torch.nn.attention.bias")
    return bias is not None and isinstance(mask, bias.CausalBias)


def as_plain_mask(
    mask: "CausalBias", is_causal: bool, device: torch.device
) -> tuple[Tensor | None, bool]:
    """The mask that PyTorch's ``CausalBias`` stands for, whose own numbers mean nothing; and whether it is causal.

    Raises:
        UsageError: ``is_causal`` besides.
    """
    from torch.nn.attention.bias import CausalVariant  # which has made the mask

    if is_causal:
        raise usage_error("is_causal", "False with a CausalBias", True, "leave it out")
    more = mask.seq_len_kv - mask.seq_len_q
    if mask.variant is CausalVariant.UPPER_LEFT or not more:
        return None, True
    seen = torch.ones(mask.seq_len_q, mask.seq_len_kv, dtype=torch.bool, device=device)
    return seen.tril(more), False


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


class Passed:
    """Calls that passed a function's checks; one like them is found by a comparison in C, which costs a fifth of these.

    The first few kinds are kept, and none of their tensors. To be asked only where ``runs_eagerly()``.
    """

    MOST = 8

    def __init__(self):
        self._kinds: list[tuple[Any, Callable[..., bool], Any]] = []

    def find(self, options: Any, *tensors: Any) -> Any:
        """What was added with equal options and tensors like these, which differ from each other; else None."""
        for kind, alike, kept in self._kinds:
            if kind == options and alike(*tensors):
                return kept
        return None

    def add(self, kept: Any, options: Any, *tensors: Tensor) -> None:
        """Let ``find`` return ``kept``, for calls with these options and tensors like these."""
        plain = all(type(x) in (Tensor, Parameter) for x in tensors)  # others' sizes may be symbols
        if plain and len(self._kinds) < self.MOST and not dispatch_modes():
            alike = likeness(tensors)
            if alike(*tensors):
                self._kinds.append((options, alike, kept))
