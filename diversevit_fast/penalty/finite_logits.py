"""Look for NaN and infinity in the logits of each step, without waiting for the GPU that computes them.

Logits on a CPU are looked at immediately. On a GPU the largest magnitude seen so far is kept in device memory and
copied to pinned host memory, where it is read later: by the next step, which then reports an earlier one, or by
whoever waits for it. NaN and infinity stay in it until they are reported, so none is lost in between, and it may be
read at any time. The same copies belong to a CUDA graph that captures the step, and every replay repeats them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch_internals import functorch_active
from ..errors import UsageError, usage_error
from .graph_capture import in_graph


class _Largest(NamedTuple):
    """The largest magnitude of any logit, on its device and as last copied to the host."""

    device: Tensor
    host: Tensor | None  # None if made inside a capture, which may not allocate pinned memory


class FiniteLogits:
    """Refuses logits that are not finite: of a CPU at once, of a GPU when their step has run."""

    def __init__(self) -> None:
        self._seen: dict[tuple[torch.device, torch.dtype], _Largest] = {}

    def note(self, logits: Tensor) -> None:
        """Look at the logits of a step; not inside ``torch.compile``.

        Raises:
            UsageError: they are on a CPU and not finite.
        """
        if torch.compiler.is_compiling():
            return
        if not _runs_apart(logits) or functorch_active():
            if not torch.isfinite(logits).all():
                raise _refusal("NaN or infinity")
            return
        logits = logits.detach()
        dtype = torch.promote_types(logits.dtype, torch.float32)
        seen = self._seen.get((logits.device, dtype))
        if seen is None:
            seen = self._seen[logits.device, dtype] = _nothing_seen(logits.device, dtype)
        if logits.numel():
            largest = torch.linalg.vector_norm(logits, math.inf, dtype=dtype)
            torch.maximum(seen.device, largest, out=seen.device)
        if seen.host is not None and (not in_graph() or seen.host.is_pinned()):
            seen.host.copy_(seen.device, non_blocking=True)

    def look(self) -> None:
        """Report what is known by now of earlier steps; waits for nothing.

        Raises:
            UsageError: logits of an earlier step were not finite.
        """
        known = (x.host.item() for x in self._seen.values() if x.host is not None)
        if not all(map(math.isfinite, known)) and not in_graph():
            self._report()

    def wait(self) -> None:
        """Wait for the steps that were started, and report.

        Raises:
            UsageError: logits of a step since the last report were not finite.
        """
        if not all(math.isfinite(x.device.item()) for x in self._seen.values()):
            self._report()

    def _report(self) -> None:
        for seen in self._seen.values():
            seen.device.zero_()
            if seen.host is not None:
                seen.host.copy_(seen.device)  # after the copies under way
        raise _refusal(
            "NaN or infinity in an earlier step: on a GPU a step is looked at when it has run"
        )


def _runs_apart(x: Tensor) -> bool:
    """Whether Python goes on while the tensor is computed, so that reading it would wait."""
    return x.is_cuda or x.is_xpu


def _nothing_seen(device: torch.device, dtype: torch.dtype) -> _Largest:
    zero = torch.zeros((), device=device, dtype=dtype)
    return _Largest(zero, None if in_graph() else torch.zeros((), dtype=dtype, pin_memory=True))


def _refusal(got: str) -> UsageError:
    hint = "lower the learning rate or the penalty's weight, or scale the loss"
    return usage_error("logits", "finite values", got, hint)
