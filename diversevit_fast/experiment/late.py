"""Copies between host and GPU that nothing waits for; on a CPU, the tensors themselves."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_APART = ("cuda", "xpu")
"""Devices that compute while Python goes on, and copy from and to pinned memory."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` of the host's memory on ``device``, copied when the device gets there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type in _APART else x.to(device)


def read_late(steps: Iterable[tuple[Sequence[Tensor], T]]) -> Iterator[tuple[Sequence[Tensor], T]]:
    """Yield each step's tensors in host memory, and what comes with them, in order.

    Those of a GPU are yielded after the next step was started, so that it does not idle meanwhile, and Python is
    one step ahead of it at most.
    """
    waiting: list[tuple[Sequence[Tensor], Any, T]] = []
    for tensors, rest in steps:
        device = tensors[0].device
        if device.type not in _APART:
            yield [x.cpu() for x in tensors], rest
            continue
        copies = [x.to("cpu", non_blocking=True) for x in tensors]  # into pinned memory
        waiting.append((copies, _now(device), rest))
        if len(waiting) > 1:
            yield _arrived(*waiting.pop(0))
    for step in waiting:
        yield _arrived(*step)


def _arrived(copies: Sequence[Tensor], event: Any, rest: T) -> tuple[Sequence[Tensor], T]:
    if not event.query():
        event.synchronize()
    return copies, rest


def _now(device: torch.device) -> Any:
    """An event that has happened when the device has done what it was given so far."""
    return torch.accelerator.current_stream(device).record_event()
