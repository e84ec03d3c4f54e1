"""What a training step changes, kept and put back bit for bit."""

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import forget_scaled, own_buffers, own_parameters
from ..errors import UnsupportedError
from ..penalty.graph_capture import ReplayedPenalty
from .optimizers import by_value, options_of

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
        self._options = options_of(optimizer)
        for value in self._options.values():
            if isinstance(value, Tensor):
                self._keep(value)
        self._state = {p: dict(state) for p, state in optimizer.state.items()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                self._keep(p)
        for state in self._state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    self._keep(value)
        self.modules: set[nn.Module] = set()
        self._places: list[tuple[nn.Module, dict[str, Any], str, Any]] = []
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
            if inner in self.modules:
                continue
            self.modules.add(inner)
            for place in (own_parameters(inner), own_buffers(inner)):
                for name, x in place.items():
                    self._places.append((inner, place, name, x))
                    if x is not None:
                        self._keep(x)

    def _keep(self, x: Tensor) -> None:
        if x not in self._tensors:
            self._tensors[x] = _once(x.detach()).clone(memory_format=torch.preserve_format)
            self._gradients[x] = x.grad if x.is_leaf else None

    def others(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Those that are no parameters, buffers, or parts of the optimizer's state."""
        own = {id(x) for state in self.optimizer.state.values() for x in state.values()}
        return [x for x in tensors if x not in self._tensors and id(x) not in own]

    def note_warm(self) -> None:
        """Note what the first step of the warm-up made, as caches do; the second finds it there."""
        self._warm_places = [(place, name, place.get(name)) for _, place, name, _ in self._places]
        options = options_of(self.optimizer)
        self._warm_options = {name: by_value(value) for name, value in options.items()}

    def refuse_replaced(self) -> None:
        """Refuse a step that puts new things where it reads them, for replays do not; after the second step.

        Raises:
            UnsupportedError: of the optimizer, that counts in its options; of a module, that replaces its buffers.
        """
        options = options_of(self.optimizer)
        for name in options:
            if by_value(options[name]) != self._warm_options.get(name):
                raise UnsupportedError(
                    f"optimizer: {type(self.optimizer).__name__} changes its option {name[1]!r} at each step, which "
                    "replays of a CUDA graph do not; use AdamW, or another that keeps count in its state"
                )
        for (place, name, x), (module, *_) in zip(self._warm_places, self._places, strict=True):
            if place.get(name) is not x:
                raise UnsupportedError(
                    f"model: {type(module).__name__} replaces its {name!r} at each step, which replays of a CUDA "
                    f"graph do not; let it write in place ({name}.copy_(...))"
                )

    def undo(self) -> None:
        """Put everything back after a step that failed, also what modules replaced."""
        for _, place, name, x in self._places:
            if place.get(name) is not x:
                place[name] = x
        self.restore()

    def restore(self) -> None:
        """Put everything back, and take out the state of the optimizer that did not exist."""
        with torch.no_grad():
            for x, value in self._tensors.items():
                _once(x).copy_(value)
        for x, gradient in self._gradients.items():
            if x.is_leaf:
                x.grad = gradient
        self._restore_state()
        self._restore_options()
        self.restore_draws()
        self.penalty.restore(self.penalty_state)
        if self.scaler is not None:
            forget_scaled(self.scaler, self.optimizer)
            self.scaler.load_state_dict(self._scaler)

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

    def _restore_options(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            before = {name: value for (j, name), value in self._options.items() if j == i}
            for name in group.keys() - before.keys() - {"params"}:
                del group[name]
            group.update(before)

    def has_new_state(self) -> bool:
        """Whether the optimizer has state that did not exist."""
        return any(
            before.get(name) is None and value is not None
            for p, state in self.optimizer.state.items()
            for before in [self._state.get(p, {})]
            for name, value in state.items()
        )

    def _restore_state(self) -> None:
        state = self.optimizer.state
        for p in list(state):
            before = self._state.get(p)
            if before is None:
                del state[p]
                continue
            state[p].clear()
            state[p].update(before)


def _once(x: Tensor) -> Tensor:
    """The elements of a tensor, those that ``expand`` repeats once."""
    return x[tuple(slice(None) if step else slice(1) for step in x.stride())]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
