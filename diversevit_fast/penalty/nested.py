"""The tensors in nested arguments or results, and what is around them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._torch_internals import tree_flatten, tree_unflatten


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
