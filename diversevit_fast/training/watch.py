"""Noticing what a graph cannot see: parameters and modules that were replaced, moved or frozen since."""

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import own_buffers, own_modules, own_parameters

_training = itemgetter("training")
_requires_grad = attrgetter("requires_grad")
_grad = attrgetter("grad")


class Watch:
    """The modules that a loss ran, their parameters and buffers, and an optimizer's, as they are now.

    Asking takes a few microseconds per hundred tensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, modules: Iterable[nn.Module]):
        self.modules = list(modules)
        self._classes = list(map(type, self.modules))
        self._optimizer = optimizer
        self._state, self._groups = optimizer.state, list(optimizer.param_groups)
        self._modes = [
            mine for m in self.modules if "training" in (mine := vars(m))
        ]  # not if compiled
        holders = (own_parameters, own_buffers, own_modules)
        self._places = [place for m in self.modules for of in holders if (place := of(m))]
        self._things = list(_values(self._places))
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        held = (*(x for x in self._things if isinstance(x, Tensor)), *self._parameters)
        self._tensors = list({id(x): x for x in held}.values())
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._sizes = [len(group["params"]) for group in self._groups]
        self.note_state()

    def note_state(self) -> None:
        """Take over the optimizer's state as it is now, which the first step of a kind makes."""
        self._states = list(self._state.values())
        self._entries = list(_values(self._states))

    def is_same(self) -> bool:
        """Whether everything is still in its place, at its address."""
        groups, states = self._optimizer.param_groups, self._states
        return (
            self._optimizer.state is self._state
            and len(groups) == len(self._groups)
            and all(map(is_, groups, self._groups))
            and [len(group["params"]) for group in groups] == self._sizes
            and len(self._state) == len(states)
            and all(map(is_, self._state.values(), states))
            and all(map(is_, _values(states), self._entries))
            and all(map(is_, map(type, self.modules), self._classes))
            and all(map(is_, _values(self._places), self._things))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )

    def has_gradients(self) -> bool:
        """Whether somebody left gradients on the optimizer's parameters."""
        return set(map(_grad, self._parameters)) != {None}

    def modes(self) -> tuple[bytes, bytes]:
        """Which modules are training, and which tensors are trained: what has a graph of its own."""
        return bytes(map(_training, self._modes)), bytes(map(_requires_grad, self._tensors))


def _values(dictionaries: list[Any]) -> Iterator[Any]:
    """All values, and an end that shows whether there are more than there were."""
    return chain(chain.from_iterable(map(dict.values, dictionaries)), (_END,))


_END = object()
