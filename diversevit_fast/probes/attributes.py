"""Attributes of the images that probes ask about, and weights that make them independent."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import usage_error
from ..heads.loader_batches import Batch, class_indices

Attribute = str | Callable[[Tensor, Any], Any] | Iterable[Any]
"""``"labels"`` or ``"groups"`` of the batches, a function ``(labels, groups) -> [b]``, or one value per image."""

_FROM_BATCHES = ("labels", "groups")


class AttributeReader:
    """Reads the attributes of batches in the loader's order.

    Raises:
        UsageError: no attributes, a name that is no word, or something else than an attribute.
    """

    def __init__(self, attributes: Mapping[str, Attribute]):
        if not isinstance(attributes, Mapping) or not attributes:
            hint = "for example {'core': 'labels', 'spurious': places}"
            got = "none" if isinstance(attributes, Mapping) else type(attributes).__name__
            raise usage_error("attributes", "a dictionary of attributes by name", got, hint)
        self._sources: dict[str, Any] = {}
        for name, source in attributes.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise usage_error("attributes", "names that are words", repr(name), "rename it")
            if isinstance(source, str):
                if source not in _FROM_BATCHES:
                    hint = "or pass a function, or the values"
                    raise usage_error(f"attributes[{name!r}]", "labels or groups", source, hint)
            elif not callable(source):
                source = _whole_numbers(name, source)
            self._sources[name] = source
        self.names = tuple(self._sources)

    def read(self, batch: Batch, seen: int) -> dict[str, Tensor]:
        """Return the values int64 ``[b]`` of each attribute of a batch, before which ``seen`` images came.

        Raises:
            UsageError: labels or groups are missing, values are no whole numbers, or too few.
        """
        return {name: self._of(name, source, batch, seen) for name, source in self._sources.items()}

    def check_end(self, seen: int) -> None:
        """Raise if there are more values than the ``seen`` images of the loader."""
        for name, source in self._sources.items():
            if isinstance(source, Tensor) and len(source) != seen:
                wanted = f"{seen} values, one for each image of the loader"
                raise usage_error(f"attributes[{name!r}]", wanted, len(source), "check the order")

    def _of(self, name: str, source: Any, batch: Batch, seen: int) -> Tensor:
        if isinstance(source, Tensor):
            found = source[seen : seen + batch.size]
            if len(found) < batch.size:
                wanted = "one value for each image of the loader"
                raise usage_error(f"attributes[{name!r}]", wanted, len(source), "check the order")
            return found
        if source == "groups":
            found = self._needed("groups", batch.groups)
        elif source == "labels":
            found = self._needed("labels", batch.labels)
        else:
            found = source(batch.labels, batch.groups)
        return class_indices(found, batch.size).long()

    def _needed(self, what: str, found: Any) -> Any:
        if found is None:
            wanted = f"{what} in the batches"
            raise usage_error("loader", wanted, "none", "pass the attribute's values instead")
        return found


def _whole_numbers(name: str, values: Any) -> Tensor:
    try:
        found = torch.as_tensor(values if hasattr(values, "dtype") else list(values)).cpu()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0, 0)
    if found.ndim != 1 or not len(found) or found.is_floating_point() or found.is_complex():
        got = f"{type(values).__name__} of another kind"
        hint = "one whole number for each image, as the model's classes"
        raise usage_error(f"attributes[{name!r}]", "whole numbers [n]", got, hint)
    return found.long()


def combinations(values: Mapping[str, Tensor]) -> Tensor:
    """Number the combinations of the attributes' values: int64 ``[n]``, from 0 without gaps.

    Raises:
        UsageError: an attribute has one value only, or a combination has no image.
    """
    sizes = 1
    for name, found in values.items():
        count = len(found.unique())
        if count < 2:
            hint = "take images of several values"
            raise usage_error(f"attributes[{name!r}]", "at least two values", count, hint)
        sizes *= count
    stacked = torch.stack(list(values.values()), 1)
    kinds, cell = stacked.unique(dim=0, return_inverse=True)
    if len(kinds) < sizes:
        wanted = f"images of all {sizes} combinations of {', '.join(values)}"
        hint = "use data in which the attributes are independent"
        raise usage_error("loader", wanted, f"{len(kinds)} combinations", hint)
    return cell


def balancing_weights(cell: Tensor) -> Tensor:
    """Return weights float64 ``[n]`` of sum 1 that give every combination the same share."""
    counts = cell.bincount().double()
    return 1 / (counts[cell] * len(counts))
