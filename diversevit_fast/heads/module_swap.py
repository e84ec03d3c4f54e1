"""Set several attributes of modules, all or none; warn of optimizers that hold the old parameters."""

import gc
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from .._torch_internals import own_parameters

Change = tuple[nn.Module, str, Any]
"""A module, the name of a parameter or a plain attribute, its new value."""
_MISSING = object()


def swap(changes: Sequence[Change]) -> None:
    """Set every attribute, or none if one cannot be set or the user interrupts."""
    before: list[Change] = []
    try:
        for module, name, value in changes:
            before.append((module, name, _current(module, name)))
            setattr(module, name, value)
    except BaseException:
        for module, name, value in reversed(before):
            _restore(module, name, value)
        raise


def replaced_parameters(changes: Sequence[Change]) -> list[nn.Parameter]:
    """The parameters that ``changes`` would replace."""
    before = (_current(module, name) for module, name, _ in changes)
    return [value for value in before if isinstance(value, nn.Parameter)]


def _current(module: nn.Module, name: str) -> Any:
    """The value the instance itself has under ``name``, or ``_MISSING``."""
    return own_parameters(module).get(name, vars(module).get(name, _MISSING))


def _restore(module: nn.Module, name: str, value: Any) -> None:
    """Set the old value again without ``__setattr__``, which may be what failed."""
    if isinstance(value, nn.Parameter):
        own_parameters(module)[name] = value
    elif value is _MISSING:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def warn_of_optimizers(replaced: Sequence[nn.Parameter]) -> None:
    """Warn if an existing optimizer holds one of the parameters that are to be replaced."""
    gone = {id(parameter) for parameter in replaced}
    kinds = _kinds(Optimizer)
    for found in [x for x in gc.get_objects() if type(x) in kinds]:
        groups = getattr(found, "param_groups", ())
        if any(id(parameter) in gone for group in groups for parameter in group["params"]):
            warnings.warn(
                f"prune_heads: {type(found).__name__} holds parameters that pruning replaces, and would "
                "train nothing of the pruned layers; make a new optimizer before training on",
                stacklevel=3,
            )


def _kinds(cls: type) -> set[type]:
    """``cls`` and all its subclasses."""
    return {cls}.union(*map(_kinds, cls.__subclasses__()))
