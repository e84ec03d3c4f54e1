"""What a call was made with: arguments of PyTorch's functions and of models, by position or by name."""

from inspect import signature
from typing import Any

from torch import Tensor

from ..ops import attention


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first axis of the first tensor in a model's call; 0 if there is none."""
    return next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), 0)


def linear_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The input and weight of a call of ``F.linear``."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    return named["input"], named["weight"]


def split_attention_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """The (q, k, v) and the other arguments by name of a call of attention, PyTorch's or ours."""
    named = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False))
    named |= {_ATTENTION_ALIASES.get(name, name): value for name, value in kwargs.items()}
    return (named.pop("q"), named.pop("k"), named.pop("v")), named


_ATTENTION_ARGUMENTS = tuple(signature(attention).parameters)
_ATTENTION_ALIASES = {"query": "q", "key": "k", "value": "v"}
