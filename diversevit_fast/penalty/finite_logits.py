"""Look for NaN and infinity in the logits of each step, without waiting for the GPU that computes them.

Also for the float16 gradients of a step that a CUDA graph captures, which cannot be computed again.

Logits on a CPU are looked at immediately. On a GPU the largest magnitude seen so far is kept in device memory and
copied to pinned host memory, where it is read later: by the next step, which then reports an earlier one, or by
whoever waits for it. NaN and infinity stay in it until they are reported, so none is lost in between, and it may be
read at any time. The same copies belong to a CUDA graph that captures the step, and every replay repeats them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_internals import functorch_active
from ..errors import UnsupportedError, UsageError, usage_error
from . import graph_capture


class _Largest(NamedTuple):
    """The largest magnitude seen, on its device and as last copied to the host, and what to say if it is not finite."""

    device: Tensor
    host: Tensor | None  # None if made inside a capture, which may not allocate pinned memory
    refusal: Callable[[], Exception]


class FiniteLogits:
    """Refuses logits that are not finite: of a CPU at once, of a GPU when their step has run."""

    def __init__(self) -> None:
        self._seen: dict[Any, _Largest] = {}

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
        largest = None
        if logits.numel():
            largest = torch.linalg.vector_norm(logits, math.inf, dtype=dtype)
        self._keep((logits.device, dtype), largest, _late_refusal)

    def note_gradients(self, finite: Tensor, grad_scale: float) -> None:
        """Look, later, whether the gradients of a captured step were ``finite``, a boolean tensor.

        Args:
            grad_scale: the factor that is too large if they were not.
        """
        largest = torch.where(finite, 0.0, math.inf).float()
        self._keep((finite.device, grad_scale), largest, lambda: _overflow(grad_scale))

    def _keep(self, key: Any, largest: Tensor | None, refusal: Callable[[], Exception]) -> None:
        seen = self._seen.get(key)
        if seen is None:
            device, kind = key
            dtype = kind if isinstance(kind, torch.dtype) else torch.float32
            seen = self._seen[key] = _nothing_seen(device, dtype, refusal)
        if largest is not None:
            torch.maximum(seen.device, largest, out=seen.device)
        if seen.host is not None and (not graph_capture.in_graph() or seen.host.is_pinned()):
            seen.host.copy_(seen.device, non_blocking=True)

    def look(self) -> None:
        """Report what is known by now of earlier steps; waits for nothing.

        Raises:
            UsageError: logits of an earlier step were not finite.
            UnsupportedError: nor were gradients.
        """
        if graph_capture.capturing():
            return
        for seen in reversed(self._seen.values()):  # gradients first: they spoil later logits
            if seen.host is not None and not math.isfinite(seen.host.item()):
                self._report(seen.refusal)

    def wait(self) -> None:
        """Wait for the steps that were started, and report.

        Raises:
            UsageError: logits of a step since the last report were not finite.
            UnsupportedError: nor were gradients.
        """
        for seen in reversed(self._seen.values()):
            if not math.isfinite(seen.device.item()):
                self._report(seen.refusal)

    def _report(self, refusal: Callable[[], Exception]) -> None:
        for seen in self._seen.values():
            seen.device.zero_()
            if seen.host is not None:
                seen.host.copy_(seen.device)  # after the copies under way
        raise refusal()


def _runs_apart(x: Tensor) -> bool:
    """Whether Python goes on while the tensor is computed, so that reading it would wait."""
    return x.is_cuda or x.is_xpu


def _nothing_seen(
    device: torch.device, dtype: torch.dtype, refusal: Callable[[], Exception]
) -> _Largest:
    zero = torch.zeros((), device=device, dtype=dtype)
    if graph_capture.in_graph():
        return _Largest(zero, None, refusal)
    return _Largest(zero, torch.zeros((), dtype=dtype, pin_memory=_runs_apart(zero)), refusal)


def _late_refusal() -> UsageError:
    return _refusal(
        "NaN or infinity in an earlier step: on a GPU a step is looked at when it has run"
    )


def _overflow(grad_scale: float) -> UnsupportedError:
    return UnsupportedError(
        f"float16: the gradients of the heads overflowed with grad_scale {grad_scale:g} in an earlier step of a CUDA "
        "graph, whose penalty was NaN; use torch.autocast with bfloat16, or a smaller grad_scale"
    )


def _refusal(got: str) -> UsageError:
    hint = "lower the learning rate or the penalty's weight, or scale the loss"
    return usage_error("logits", "finite values", got, hint)
