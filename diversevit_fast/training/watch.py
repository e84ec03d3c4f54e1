"""Noticing what a graph cannot see: parameters and modules that were replaced, moved or frozen since."""

from collections.abc import Iterable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import own_buffers, own_modules, own_parameters

_training = attrgetter("training")
_requires_grad = attrgetter("requires_grad")


class Watch:
    """The modules that a loss ran, their parameters and buffers, and an optimizer's, as they are now.

    Asking takes a few microseconds per hundred tensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, modules: Iterable[nn.Module]):
        self.modules = list(modules)
        self._optimizer = optimizer
        self._state, self._groups = optimizer.state, list(optimizer.param_groups)
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._things: list[Any] = []
        for module in self.modules:
            for place in (own_parameters(module), own_buffers(module), own_modules(module)):
                for name, thing in place.items():
                    self._places.append(place)
                    self._names.append(name)
                    self._things.append(thing)
        held = {id(x): x for x in self._things if isinstance(x, Tensor)}
        held |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._tensors = list(held.values())
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._sizes = [len(group["params"]) for group in self._groups]

    def is_same(self) -> bool:
        """Whether everything is still in its place, at its address."""
        groups = self._optimizer.param_groups
        return (
            self._optimizer.state is self._state
            and len(groups) == len(self._groups)
            and all(map(is_, groups, self._groups))
            and [len(group["params"]) for group in groups] == self._sizes
            and all(map(is_, map(dict.get, self._places, self._names), self._things))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )

    def modes(self) -> tuple[bytes, bytes]:
        """Which modules are training, and which tensors are trained: what has a graph of its own."""
        return bytes(map(_training, self.modules)), bytes(map(_requires_grad, self._tensors))
