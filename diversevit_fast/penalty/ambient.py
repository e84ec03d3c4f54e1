"""What a forward finds around it, noted and put back where it is run again: autocast, random numbers and modes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class Autocast:
    """A context of the state that autocast had when it was made, for a kind of device and the CPU.

    Inside it casts of weights are not cached: a cached one belongs to the graph in which it was made.
    """

    def __init__(self, device: str):
        self.device = device
        self._states = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys((device, "cpu"))
            if torch.amp.is_autocast_available(kind)
        ]

    def uses(self, dtype: torch.dtype) -> bool:
        """Whether autocast computes in ``dtype``."""
        return any(enabled and dtype == used for _, enabled, used in self._states)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in self._states:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


class RandomState:
    """The state that PyTorch's generators had when it was made: the CPU's, and those of the tensors' devices."""

    def __init__(self, tensors: Sequence[Tensor], device: str):
        self._device = device
        self._cpu = torch.get_rng_state()
        self._numbers, self._states = [], []
        if device != "cpu" and torch.get_device_module(device).is_initialized():
            self._numbers, self._states = get_device_states(*tensors)

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._cpu)
        if self._numbers:
            set_device_states(self._numbers, self._states, device_type=self._device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A context in which the generators are put back, and after which they are as before."""
        kind = self._device if self._numbers else "cuda"
        with torch.random.fork_rng(self._numbers, device_type=kind):
            self.restore()
            yield


class Modes:
    """A context in which the modules inside one are in training mode, or not, as they were when it was made."""

    def __init__(self, module: nn.Module):
        self._training = [(inner, inner.training) for inner in module.modules()]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        changed = [inner for inner, training in self._training if inner.training != training]
        for inner in changed:
            inner.training = not inner.training
        try:
            yield
        finally:
            for inner in changed:
                inner.training = not inner.training
