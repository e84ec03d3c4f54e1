"""What a training step changes, kept and put back bit for bit."""

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import forget_scaled
from ..penalty.graph_capture import ReplayedPenalty

State = dict[Tensor, dict[str, Any]]
"""An optimizer's ``state``."""


class Snapshot:
    """Parameters, buffers, optimizer, generators, penalty and scaler as they are now.

    Args:
        modules: whose parameters and buffers are kept; ``add`` takes more, before they run.
        generators: kept besides PyTorch's own and Python's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        penalty: ReplayedPenalty,
        scaler: Any,
        device: torch.device,
        modules: Iterable[nn.Module],
        generators: Iterable[torch.Generator],
    ):
        self.optimizer, self.penalty, self.scaler = optimizer, penalty, scaler
        self._tensors: dict[Tensor, Tensor] = {}
        self._gradients: dict[Tensor, Tensor | None] = {}
        self._state = {p: dict(state) for p, state in optimizer.state.items()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                self._keep(p)
        for state in self._state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._keep(value)
        self.modules: set[nn.Module] = set()
        for module in modules:
            self.add(module)
        own = [torch.default_generator]
        if device.type == "cuda":
            own.append(torch.cuda.default_generators[_index(device)])
        self._generators = [(g, g.get_state()) for g in (*own, *generators)]
        self._random = random.getstate()
        self.penalty_state = penalty.state()
        self._scaler = None if scaler is None else scaler.state_dict()

    def add(self, module: nn.Module) -> None:
        """Keep also the parameters and buffers of this module and those inside it."""
        if module in self.modules:
            return
        for inner in module.modules():
            self.modules.add(inner)
            for x in (*inner.parameters(recurse=False), *inner.buffers(recurse=False)):
                self._keep(x)

    def _keep(self, x: Tensor) -> None:
        if x not in self._tensors:
            self._tensors[x] = x.detach().clone(memory_format=torch.preserve_format)
            self._gradients[x] = x.grad if x.is_leaf else None

    def restore(self) -> "NewState":
        """Put everything back.

        Returns:
            The optimizer's state that did not exist, which is taken out.
        """
        with torch.no_grad():
            for x, value in self._tensors.items():
                x.copy_(value)
        for x, gradient in self._gradients.items():
            if x.is_leaf:
                x.grad = gradient
        new = self._restore_state()
        self.restore_draws()
        self.penalty.restore(self.penalty_state)
        if self.scaler is not None:
            forget_scaled(self.scaler, self.optimizer)
            self.scaler.load_state_dict(self._scaler)
        return new

    def restore_draws(self) -> None:
        """Put back the generators alone."""
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._random)

    def has_drawn_on_host(self) -> bool:
        """Whether a generator of the CPU or of Python was used since."""
        on_cpu = ((g, s) for g, s in self._generators if g.device.type == "cpu")
        return random.getstate() != self._random or any(
            not torch.equal(generator.get_state(), state) for generator, state in on_cpu
        )

    def _restore_state(self) -> "NewState":
        state, new = self.optimizer.state, NewState(self.optimizer)
        for p in list(state):
            before = self._state.get(p)
            if before is None:
                new.tensors[p] = state.pop(p)
                continue
            made = {k: v for k, v in state[p].items() if before.get(k) is None and v is not None}
            if made:
                new.tensors[p] = made
            state[p].clear()
            state[p].update(before)
        return new


class NewState:
    """Tensors for an optimizer's state that a graph reads and writes, before that state exists."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.tensors: State = {}

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @torch.no_grad()
    def take_over(self) -> None:
        """Put the tensors in the place of those that a step made meanwhile, with their values."""
        for p, mine in self.tensors.items():
            state = self.optimizer.state[p]
            for name, value in mine.items():
                if isinstance(value, Tensor) and isinstance(state.get(name), Tensor):
                    state[name] = value.copy_(state[name])


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
