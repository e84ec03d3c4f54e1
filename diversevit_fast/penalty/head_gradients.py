"""Gradients of a prediction with respect to its attention heads, all layers in one backward pass.

``wrt="output"``: g_h = dp*/do_h, the gradient of the head's output. ``wrt="input"``: u_h = (do_h/dx)^T g_h,
what head h alone passes to its layer's input. It factors as u_h = r_h W_h, with r_h the gradient of the
head's slice of the projection's output, so one backward pass gives every head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .captured import Captured

HeadGradients = list[Tensor | None]
"""The gradient of each of one ``Captured``'s tensors; None where no path leads to it."""


def head_gradients(
    score: Tensor, runs: Sequence[Captured], scale: float | Tensor = 1.0
) -> list[HeadGradients]:
    """Differentiate ``sum(scale * score)`` with respect to every captured tensor."""
    total = score.sum() if isinstance(scale, float) and scale == 1 else score.sum() * scale
    tensors = [x for run in runs for x in run.tensors]
    create_graph = torch.is_grad_enabled()
    grads = iter(
        torch.autograd.grad(
            total, tensors, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
    )
    return [[next(grads) for _ in run.tensors] for run in runs]
