"""The tensors in nested arguments or results, and what is around them."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .._torch_internals import tree_flatten, tree_unflatten

_VALUES = (
    *(bool, int, float, complex, str, bytes, range, slice, Enum),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)


class Nested:
    """Nested tuples, lists and dictionaries, without the tensors in them.

    Args:
        flat: what was in them, in order.
        tree: how it was nested.
    """

    def __init__(self, flat: Sequence[Any], tree: Any):
        self._tree = tree
        self._places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
        self._others = [None if isinstance(x, Tensor) else x for x in flat]

    @property
    def is_plain(self) -> bool:
        """Whether all that was not a tensor is a value that nobody can change."""
        return all(x is None or isinstance(x, _VALUES) for x in self._others)

    def is_same(self, other: "Nested") -> bool:
        """Whether ``other`` was nested in the same way, around the same."""
        return self._tree == other._tree and self._others == other._others

    def around(self, tensors: Sequence[Tensor]) -> Any:
        """The same around other tensors, in tuples, lists and dictionaries of its own."""
        flat = list(self._others)
        for place, x in zip(self._places, tensors, strict=True):
            flat[place] = x
        return tree_unflatten(flat, self._tree)


def split(nested: Any) -> tuple[tuple[Tensor, ...], Nested]:
    """The tensors in ``nested``, in order, and what is around them."""
    flat, tree = tree_flatten(nested)
    return tuple(x for x in flat if isinstance(x, Tensor)), Nested(flat, tree)
