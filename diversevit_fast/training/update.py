"""One training step, written once for all devices: gradients, their scaling and clipping, and the optimizer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch_internals import tree_flatten, tree_unflatten
from ..errors import usage_error
from .optimizers import DeviceOptions

Loss = Callable[..., Any]
Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""What a step was called with: arguments by position and by name."""


@dataclass(frozen=True)
class Update:
    """A step of ``optimizer`` on ``loss(*batch)``; calling it takes one.

    Attributes:
        amp: the dtype of autocast, or None.
        clip: the largest norm of all gradients together, or None.
        scaler: an enabled ``GradScaler``, or None.
        accumulate: how many equal parts a batch is cut into, which run in turn.
        options: of the optimizer, as they are during its step.
    """

    loss: Loss
    optimizer: torch.optim.Optimizer
    device: torch.device
    amp: torch.dtype | None
    clip: float | None
    scaler: Any
    accumulate: int
    options: DeviceOptions

    def __call__(self, batch: Batch) -> Any:
        """Take a step; gradients are gone after it.

        Returns:
            What ``loss`` returned, without graphs. Of several parts the mean of the scalars, and a list of the rest.
        """
        self.forget_gradients()
        values, extras = [], []
        for positional, named in self._parts(batch):
            with self._autocast():
                result = self.loss(*positional, **named)
            value, *rest = result if isinstance(result, tuple) else (result,)
            _check_results(value, rest)
            extras.append(_detached(rest))
            values.append(value.detach())
            value = value if self.accumulate == 1 else value / self.accumulate
            self._backward(value if self.scaler is None else self.scaler.scale(value))
            del result, value, rest
        self._apply()
        self.forget_gradients()
        value = values[0] if len(values) == 1 else torch.stack(values).mean()
        if not extras[0]:
            return value
        return value, *(extras[0] if len(extras) == 1 else map(list, zip(*extras, strict=True)))

    def parameters(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, value: Tensor) -> None:
        """Run backward; in a graph for the optimizer's parameters alone.

        The graph would add to gradients of others where they are now, and go on writing there when they are freed.
        """
        if self.options.device is None:
            value.backward()
            return
        trained = [p for p in self.parameters() if p.requires_grad]
        value.backward(inputs=trained or None)

    def _apply(self) -> None:
        if self.clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        with self.options.on_device():
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()

    def _autocast(self) -> torch.autocast:
        """Autocast that keeps no cast weights beyond the step, also inside somebody else's."""
        kind = self.device.type
        outside = torch.is_autocast_enabled(kind)
        if self.amp is None:
            dtype = torch.get_autocast_dtype(kind)
            return torch.autocast(kind, dtype, enabled=outside, cache_enabled=False)
        return torch.autocast(kind, self.amp, cache_enabled=not outside)

    def _parts(self, batch: Batch) -> list[Batch]:
        if self.accumulate == 1:
            return [batch]
        leaves, layout = tree_flatten(batch)
        sizes = {len(x) for x in leaves if isinstance(x, Tensor) and x.ndim}
        if len(sizes) != 1 or (size := sizes.pop()) % self.accumulate:
            wanted = f"batches of one size, a multiple of {self.accumulate}"
            raise usage_error(
                "accumulate",
                wanted,
                [len(x) for x in leaves if isinstance(x, Tensor) and x.ndim],
                "drop the last, smaller batch",
            )
        chunk = size // self.accumulate
        return [
            tree_unflatten(
                [x[i : i + chunk] if isinstance(x, Tensor) and x.ndim else x for x in leaves],
                layout,
            )
            for i in range(0, size, chunk)
        ]


def _detached(tree: Any) -> Any:
    leaves, layout = tree_flatten(tree)
    return tree_unflatten([x.detach() if isinstance(x, Tensor) else x for x in leaves], layout)


def _check_results(value: Any, rest: list[Any]) -> None:
    wanted, hint = "a scalar tensor, or a tuple of one and more tensors", "return loss, logits"
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise usage_error("loss", wanted, got, hint)
    for other in tree_flatten(rest)[0]:
        if other is not None and not isinstance(other, Tensor):
            hint = "a number would stay what it is now in every replay; make it a tensor"
            raise usage_error("loss", wanted, f"a {type(other).__name__} among them", hint)
