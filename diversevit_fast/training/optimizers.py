"""Optimizers inside a CUDA graph: which can be, their options as tensors, and what stays a number."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._torch_internals import steps_with_scaler
from ..errors import UnsupportedError, usage_error

_TENSOR_RATE = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that take the learning rate from a tensor without reading it on the host; fused ones all do."""


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no optimizer, or one that cannot take a step by itself.

    Raises:
        UsageError: not an optimizer.
        UnsupportedError: it evaluates the loss itself, or has sparse gradients.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        hint = "pass the optimizer inside a wrapper"
        raise usage_error("optimizer", "a torch.optim.Optimizer", type(optimizer).__name__, hint)
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UnsupportedError(
            f"optimizer: {name} evaluates the loss several times a step; use one whose step() needs no closure"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UnsupportedError(f"optimizer: {name} is for sparse gradients; use Adam")


def check_for_graphs(optimizer: torch.optim.Optimizer, scaler: Any) -> torch.device:
    """Return the device of the parameters.

    Raises:
        UnsupportedError: the parameters are on several devices; with a scaler, the optimizer asks it on the host
            whether to step.
    """
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(devices) != 1:
        raise UnsupportedError(
            f"optimizer: its parameters are on {len(devices)} devices; a graph needs one"
        )
    if scaler is not None and not steps_with_scaler(optimizer):
        raise UnsupportedError(
            f"scaler: {type(optimizer).__name__} would wait to know whether gradients overflowed; make it "
            "with fused=True"
        )
    return devices.pop()


class DeviceOptions:
    """An optimizer's options during a step that a graph records: learning rates are tensors, state is on the device.

    Outside of the step its groups hold what the user put there.

    Args:
        device: None for steps that no graph records, which change nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device | None):
        self.optimizer, self.device = optimizer, device
        self._rates: list[Tensor | None] = []
        self._known: list[float | None] = []

    def prepare(self) -> None:
        """Take over the optimizer as it is now: its groups, and state of before."""
        self._rates, self._known = [], []
        for group in self.optimizer.param_groups:
            rate = None
            if "lr" in group and not _on_device(group["lr"]) and self._takes_tensor(group):
                rate = torch.zeros((), device=self.device, dtype=torch.float32)
            self._rates.append(rate)
            self._known.append(None)
            if group.get("capturable") is None and not group.get("fused"):
                continue
            for p in group["params"]:
                step = self.optimizer.state.get(p, {}).get("step")
                if isinstance(step, Tensor) and step.device != p.device:
                    self.optimizer.state[p]["step"] = step.to(p.device, torch.float32)
        self.refresh()

    def refresh(self) -> None:
        """Bring the tensors of learning rates to the numbers in the groups; waits for nothing."""
        for i, rate in enumerate(self._rates):
            if rate is not None:
                number = float(self.optimizer.param_groups[i]["lr"])
                if number != self._known[i]:
                    rate.fill_(number)
                    self._known[i] = number

    def frozen(self) -> tuple[Any, ...]:
        """The options that a graph records as they are: another value needs another graph."""
        return tuple(
            by_value(value)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True)
            for name, value in group.items()
            if name != "params" and (name != "lr" or rate is None)
        )

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A context for the optimizer's step."""
        if self.device is None:
            yield
            return
        groups = self.optimizer.param_groups
        before = [{k: g[k] for k in ("lr", "capturable") if k in g} for g in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                if rate is not None:
                    group["lr"] = rate
                if "capturable" in group:
                    group["capturable"] = True
            yield
        finally:
            for group, own in zip(groups, before, strict=True):
                group.update(own)

    def _takes_tensor(self, group: dict[str, Any]) -> bool:
        return bool(group.get("fused")) or type(self.optimizer) in _TENSOR_RATE


def options_of(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    """Every option of an optimizer but its parameters, by group and name."""
    groups = enumerate(optimizer.param_groups)
    return {(i, name): x for i, group in groups for name, x in group.items() if name != "params"}


def refuse_host_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that counts on the host, where replays do not count.

    Raises:
        UnsupportedError: its state has numbers, or tensors elsewhere than the parameter.
    """
    for p, state in optimizer.state.items():
        for name, value in state.items():
            elsewhere = isinstance(value, Tensor) and value.device != p.device
            if elsewhere or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                raise UnsupportedError(
                    f"optimizer: {type(optimizer).__name__} keeps {name!r} on the host, where replays of a CUDA "
                    "graph do not count; make it with fused=True or capturable=True, or use AdamW"
                )


def _on_device(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type != "cpu"


def by_value(value: Any) -> Any:
    """An option in a form that can be compared: tensors on the host by value, on a device by identity."""
    if isinstance(value, Tensor):
        return id(value) if _on_device(value) else value.tolist()
    return tuple(map(by_value, value)) if isinstance(value, (list, tuple)) else value
