"""Gradients of a prediction with respect to its attention heads, all layers in one backward pass.

``wrt="output"``: g_h = dp*/do_h, the gradient of the head's output. ``wrt="input"``: u_h = (do_h/dx)^T g_h,
what head h alone passes to its layer's input. It factors as u_h = r_h W_h, with r_h the gradient of the
head's slice of the projection's output, so one backward pass gives every head.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import set_multithreading_enabled

from .captured import Captured

HeadGradients = list[Tensor | None]
"""The gradient of each of one ``Captured``'s tensors; None where no path leads to it."""


def head_gradients(
    score: Tensor,
    runs: Sequence[Captured],
    scale: float | Tensor = 1.0,
    weights: Tensor | None = None,
) -> list[HeadGradients]:
    """Differentiate ``sum(scale * weights * score)`` with respect to every captured tensor.

    On this thread: a GPU's own, which PyTorch would use, starts later, and waits for Python as this one does.
    """
    tensors = [x for run in runs for x in run.tensors]
    create_graph = torch.is_grad_enabled()
    here = nullcontext() if torch.compiler.is_compiling() else set_multithreading_enabled(False)
    on_device = isinstance(scale, Tensor)  # where a CUDA graph may not read it
    if weights is None:
        weights = torch.full_like(score, 1.0 if on_device else scale)
    elif not on_device and scale != 1.0:
        weights = weights * scale
    if on_device:
        weights = weights * scale
    with here:
        grads = torch.autograd.grad(
            score,
            tensors,
            weights,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
    of_run = iter(grads)
    return [[next(of_run) for _ in run.tensors] for run in runs]
