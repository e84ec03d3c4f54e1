"""Split the batches of a data loader into a model's inputs, labels and groups."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment.attention_modules import plain_class
from ..attachment.call_arguments import batch_size
from ..errors import usage_error


@dataclass
class Batch:
    """The arguments of a model's call, with the labels and groups as the loader returned them."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    labels: Any = None
    groups: Any = None

    @property
    def size(self) -> int:
        return batch_size(self.args, self.kwargs)


def split_batch(name: str, batch: Any, model: nn.Module, device: torch.device) -> Batch:
    """Split ``batch`` and move its images to ``device``.

    Raises:
        UsageError: the batch, of the loader ``name``, has another form.
    """
    if isinstance(batch, Mapping):
        found = _split_mapping(name, batch, model)
    else:
        parts = batch if isinstance(batch, (tuple, list)) else (batch,)
        images = parts[0] if parts else None
        if hasattr(images, "dtype"):  # NumPy's
            images = _as_tensor(images)
        if not isinstance(images, Tensor) or not images.ndim or len(parts) > 3:
            raise _no_batch(name, batch)
        found = Batch((images,), {}, *parts[1:])
    found.args = tuple(x.to(device) for x in found.args)
    found.kwargs = {key: x.to(device) for key, x in found.kwargs.items()}
    return found


_LABELS, _GROUPS = ("labels", "label"), ("groups", "group")


def _split_mapping(name: str, batch: Mapping[str, Any], model: nn.Module) -> Batch:
    """Split a dictionary into labels, groups and the arguments that the model's forward names."""
    answers = []
    for names in (_LABELS, _GROUPS):
        there = [key for key in names if key in batch]
        if len(there) > 1:
            raise usage_error(name, f"one of {' and '.join(names)} in a batch", "both", "drop one")
        answers.append(batch[there[0]] if there else None)
    inputs = {
        key: x for key, x in batch.items() if key not in _LABELS + _GROUPS and isinstance(x, Tensor)
    }
    forward = vars(model).get("forward", plain_class(model).forward)
    parameters = inspect.signature(forward).parameters.values()
    takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    named = {key: x for key, x in inputs.items() if key in takes and x.ndim}
    if not named and any(p.kind is p.VAR_KEYWORD for p in parameters) and takes <= {"self"}:
        named = inputs
    if named:
        return Batch((), named, *answers)
    if len(inputs) != 1:
        raise _no_batch(name, batch)
    return Batch(tuple(inputs.values()), {}, *answers)


def _no_batch(name: str, batch: Any) -> Exception:
    wanted = "batches (images, labels) or (images, labels, groups), or dictionaries of the model's inputs"
    if isinstance(batch, Mapping):
        got = f"a dictionary of {', '.join(map(str, batch))}"
    elif isinstance(batch, (tuple, list)):
        got = f"({', '.join(type(x).__name__ for x in batch)})"
    else:
        got = type(batch).__name__
    return usage_error(name, wanted, got, "give images as one tensor")


def class_indices(labels: Any, count: int) -> Tensor:
    """Convert labels to a tensor ``[count]`` on the CPU.

    Raises:
        UsageError: they are names or fractions, or not one per image.
    """
    found = _as_tensor(labels)
    if found is None:
        hint = "map the names to the model's class indices"
        raise usage_error("labels", "class indices", _example(labels), hint)
    if found.shape != (count,):
        raise usage_error("labels", f"shape [{count}]", list(found.shape), "give one per image")
    if found.is_complex() or (found.is_floating_point() and not (found == found.trunc()).all()):
        raise usage_error("labels", "class indices", "numbers that are not whole", "check the data")
    return found


def group_names(groups: Any, count: int, named: bool) -> Tensor | list[str]:
    """Convert groups to ``[count]`` numbers on the CPU; where ``named``, strings stay strings.

    Raises:
        UsageError: they are something else, or not one per image.
    """
    found = _as_tensor(groups)
    if found is None:
        names = _items(groups)
        if not names or not all(isinstance(name, str) for name in names):
            raise usage_error(
                "groups", "numbers or strings", _example(groups), "give one per image"
            )
        if not named:
            hint = "map the names to numbers for a score of your own"
            raise usage_error("groups", "numbers", _example(groups), hint)
        if len(names) != count:
            raise usage_error("groups", f"shape [{count}]", [len(names)], "give one per image")
        return [str(name) for name in names]
    if found.shape != (count,):
        raise usage_error("groups", f"shape [{count}]", list(found.shape), "give one per image")
    if found.is_floating_point() and found.isnan().any():
        raise usage_error("groups", "numbers", "NaN", "check the data")
    return found


def _as_tensor(given: Any) -> Tensor | None:
    """Convert to a tensor on the CPU; None if it holds anything but numbers."""
    try:
        return torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError):
        return None


def _items(given: Any) -> list[Any]:
    """The items of a list, tuple, array or column; empty for anything else."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    return list(listed) if isinstance(listed, (list, tuple)) else []


def _example(given: Any) -> str:
    first = next(iter(_items(given)), given)
    return f"{type(first).__name__} {first!r}" if isinstance(first, str) else type(first).__name__
