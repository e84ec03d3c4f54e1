"""Run modules on the drawn samples and on the rest separately, so that second order costs a fraction.

A module that treats samples independently gives the same output whether its batch runs whole or in two
parts. Where a tensor goes unchanged from one split module to the next, its two parts are passed on, so
the graph of the drawn samples stays apart from the rest. Where something changes the tensor in between,
the parts are entangled: the numbers stay right, but the rest is differentiated twice as well.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import BatchNorm, write_count
from ..errors import UnsupportedError, usage_error
from . import graph_capture


@dataclass(frozen=True)
class _Parts:
    """The output of a split module: ``whole`` joins ``chosen`` and ``rest`` while its version is the same."""

    whole: Tensor
    version: int
    chosen: Tensor
    rest: Tensor


class SampleSplit:
    """Draws samples, and runs the modules it wraps first on these and then on the rest.

    Args:
        fraction: ``round(fraction * B)`` samples of a batch of B, at least one.
        generator: draws them; the global one of the batch's device if None.

    Attributes:
        running: a module is running on the drawn samples or on the rest.
        with_rest: a module is running on the rest.
        entangled: the rest is computed from a tensor that depends on the drawn samples.

    Raises:
        UsageError: a fraction that is not above 0 and at most 1, or no generator.
    """

    def __init__(self, fraction: float, generator: torch.Generator | None = None):
        number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if not number or not 0 < fraction <= 1:
            wanted = "a number above 0 and at most 1"
            raise usage_error("fraction", wanted, repr(fraction), "1 is every sample")
        if generator is not None and not isinstance(generator, torch.Generator):
            hint = "or leave it out"
            raise usage_error("generator", "a torch.Generator", type(generator).__name__, hint)
        self.fraction, self.generator = fraction, generator
        self.running = self.with_rest = self.entangled = False
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._outside: list[Tensor] | None = None
        self._last: _Parts | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles, without draws: they draw their own samples."""
        return {"fraction": self.fraction, "generator": self.generator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SampleSplit.__init__(self, **state)

    def forget(self) -> None:
        """Forget the drawn samples: draw again from the next batch on."""
        self._orders.clear()
        self._last = None

    @contextmanager
    def drawn_outside(self) -> Iterator[list[Tensor]]:
        """A context around the capture of a CUDA graph: samples drawn by a CPU generator become its inputs.

        Yields:
            The graph's inputs, in the order of the draws; ``draw`` fills them before a replay.
        """
        self._outside = []
        try:
            yield self._outside
        finally:
            self._outside = None

    def draw(self, orders: Sequence[Tensor]) -> None:
        """Draw the samples of the next replay, as the step itself would."""
        for order in orders:
            order.copy_(self._drawn_on_host(len(order), order.device), non_blocking=True)

    def check_reached(self, name: str, batch: int) -> None:
        """Refuse a layer that runs on the whole batch although its block should be split."""
        if not self.running and self._count(batch) < batch:
            raise UnsupportedError(
                f"fraction: {name} does not run inside its block's own forward; use fraction=1"
            )

    def samples(self, batch: int) -> Tensor | None:
        """The indices of the samples drawn from a batch of that size; None if it is all of them.

        Raises:
            UsageError: the wrapped modules ran on a batch of another size.
        """
        count = self._count(batch)
        if count == batch:
            return None
        if batch not in self._orders:
            wanted = "1 for a model whose blocks see another batch than its logits have"
            raise usage_error("fraction", wanted, self.fraction, "drop it, or fold no axis into B")
        return self._orders[batch][0][:count]

    def wrapper_of(self, module: nn.Module) -> Callable[..., Tensor]:
        """Make the wrapper that runs ``module``'s forward in two parts.

        Raises:
            UnsupportedError: the module mixes samples.
        """
        name = type(module).__name__
        if any(isinstance(m, BatchNorm) for m in module.modules()):
            raise UnsupportedError(
                f"fraction: {name} holds a BatchNorm, which mixes samples; use fraction=1"
            )

        def run(_: nn.Module, forward: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
            if self.running or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            x, others = args[0] if args else None, (*args[1:], *kwargs.values())
            if not isinstance(x, Tensor) or any(isinstance(other, Tensor) for other in others):
                raise UnsupportedError(
                    f"fraction: {name} is not called with one tensor [B, ...]; use fraction=1"
                )
            if self._count(len(x)) == len(x):
                return forward(*args, **kwargs)
            return self._in_two(name, lambda part: forward(part, *args[1:], **kwargs), x)

        return run

    def _in_two(self, name: str, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        order, place = self._order_of(x)
        chosen, rest = self._parts_of(x, order)
        self.running = True
        try:
            chosen_out = forward(chosen)
            self.with_rest = True
            rest_out = forward(rest)
        finally:
            self.running = self.with_rest = False
        if not isinstance(chosen_out, Tensor) or len(chosen_out) != len(chosen):
            raise UnsupportedError(
                f"fraction: {name} does not return one tensor [B, ...]; use fraction=1"
            )
        whole = torch.cat([chosen_out, rest_out]).index_select(0, place)
        self._last = _Parts(whole, write_count(whole), chosen_out, rest_out)
        return whole

    def _parts_of(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        last = self._last
        if last is not None and x is last.whole and write_count(x) == last.version:
            return last.chosen, last.rest
        self.entangled = last is not None
        count = self._count(len(x))
        chosen, rest = x.index_select(0, order).split([count, len(x) - count])
        return chosen, rest

    def _order_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's indices with the drawn ones first, and the inverse; one draw until ``forget``."""
        batch = len(x)
        if batch not in self._orders:
            order = self._draw(batch, x.device)
            self._orders[batch] = order, order.argsort()
        return self._orders[batch]

    def _draw(self, batch: int, device: torch.device) -> Tensor:
        """A random order of the batch; inside a capture, where the CPU draws none, a tensor that is given one."""
        source = device if self.generator is None else self.generator.device
        if source.type == "cpu" and graph_capture.capturing():
            if self._outside is None:
                raise UnsupportedError(
                    "fraction: samples drawn by a CPU generator would be the same in all replays of a CUDA "
                    "graph; use dvf.graph_step(..., diversity=...), or a generator of the GPU"
                )
            if graph_capture.rehearsing():
                return torch.arange(batch, device=device)
            self._outside.append(torch.empty(batch, dtype=torch.int64, device=device))
            return self._outside[-1]
        if source.type != "cpu":
            return torch.randperm(batch, device=source, generator=self.generator).to(device)
        return self._drawn_on_host(batch, device).to(device, non_blocking=True)

    def _drawn_on_host(self, batch: int, device: torch.device) -> Tensor:
        """A random order drawn by the CPU, in memory that a GPU copies from while Python goes on."""
        order = torch.randperm(batch, device="cpu", generator=self.generator)
        return order.pin_memory() if device.type in ("cuda", "xpu") else order

    def _count(self, batch: int) -> int:
        return min(batch, max(1, round(self.fraction * batch)))
