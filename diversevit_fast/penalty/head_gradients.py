"""Gradients of a prediction with respect to its attention heads, all layers in one backward pass.

``wrt="output"``: g_h = dp*/do_h, the gradient of the head's output. ``wrt="input"``: u_h = (do_h/dx)^T g_h,
what head h alone passes to its layer's input. It factors as u_h = r_h W_h, with r_h the gradient of the
head's slice of the projection's output, so one backward pass gives every head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import set_multithreading_enabled

from .._torch_internals import functorch_active
from .captured import Captured
from .recomputed_gelu import RecomputedGelu

HeadGradients = list[Tensor | None]
"""The gradient of each of one ``Captured``'s tensors; None where no path leads to it."""
OnRun = Callable[[int, HeadGradients], None]
"""What is done with the gradients of the run at a place when they are there."""


def head_gradients(
    score: Tensor,
    runs: Sequence[Captured],
    scale: float | Tensor = 1.0,
    weights: Tensor | None = None,
    on_run: OnRun = lambda i, grads: None,
    linears: Sequence[Any] = (),
) -> list[HeadGradients]:
    """Differentiate ``sum(scale * weights * score)`` with respect to every captured tensor.

    On this thread: a GPU's own, which PyTorch would use, starts later, and waits for Python as this one does.

    Args:
        on_run: is called for each run that the score depends on. As soon as all its gradients are there, while the
            backward pass goes on to the layers below: what it computes stands between two layers in autograd's
            order, so that when the result is differentiated, the layers follow one another, and what belongs to
            one is freed before the next. Inside a compiled loss, after the pass.
        linears: nodes of linear layers whose input, the output of a GELU, may be computed again.
    """
    on_device = isinstance(scale, Tensor)  # where a CUDA graph may not read it
    if weights is None:
        weights = torch.full_like(score, 1.0 if on_device else scale)
    elif not on_device and scale != 1.0:
        weights = weights * scale
    if on_device:
        weights = weights * scale
    if torch.compiler.is_compiling():
        found = _gradients(score, runs, weights)
        for i, grads in enumerate(found):
            if any(g is not None for g in grads):
                on_run(i, grads)
        return found
    arrivals = _Arrivals(runs, on_run, _recomputed(score, linears))
    with set_multithreading_enabled(False), arrivals:
        found = _gradients(score, runs, weights)
    arrivals.finish(found)
    return found


def _gradients(score: Tensor, runs: Sequence[Captured], weights: Tensor) -> list[HeadGradients]:
    grads = torch.autograd.grad(
        score,
        [x for run in runs for x in run.tensors],
        weights,
        create_graph=torch.is_grad_enabled(),
        retain_graph=True,
        allow_unused=True,
    )
    of_run = iter(grads)
    return [[next(of_run) for _ in run.tensors] for run in runs]


def _recomputed(score: Tensor, linears: Sequence[Any]) -> RecomputedGelu | None:
    """What frees tensors during the pass, where it makes a graph for later and nobody but autograd sees it."""
    seen = not torch.is_grad_enabled() or functorch_active()
    return None if seen else RecomputedGelu(score, list(linears))


class _Arrivals:
    """The gradients of runs, noted by hooks while the backward pass inside the block computes them."""

    def __init__(self, runs: Sequence[Captured], on_run: OnRun, gelu: RecomputedGelu | None):
        self._runs, self._on_run, self._gelu = runs, on_run, gelu
        self._grads: list[HeadGradients] = [[None] * len(run.tensors) for run in runs]
        self._done = [False] * len(runs)

    def __enter__(self) -> None:
        self._hooks = [
            x.register_hook(partial(self._arrive, i, place))
            for i, run in enumerate(self._runs)
            for place, x in enumerate(run.tensors)
        ]

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _arrive(self, i: int, place: int, grad: Tensor) -> None:
        self._grads[i][place] = grad
        if all(g is not None for g in self._grads[i]):
            self._done[i] = True
            if self._gelu is not None:
                self._gelu.free(self._runs[i].tensors[place], grad)
            self._on_run(i, self._grads[i])
            self._grads[i] = []

    def finish(self, found: Sequence[HeadGradients]) -> None:
        """Call what the hooks did not: for runs some of whose tensors have no gradient."""
        for i, grads in enumerate(found):
            if not self._done[i] and any(g is not None for g in grads):
                self._on_run(i, grads)
