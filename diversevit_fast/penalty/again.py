"""Functions whose graphs are not kept, in any order of derivative: each is made again where it is differentiated.

PyTorch's checkpoint computes a function again when its gradient is taken. Where that gradient has a graph of its own,
for it is differentiated again, all that was computed again stays with it, of every checkpoint at once. Here the
gradient is another function of this kind, of the same inputs and of the gradient that arrives:

    y = f(x, w)                          keeps x
    dx, dw = (df/d(x, w))^T g            keeps x and g, and makes the graphs of both orders when it is differentiated

so that the graphs of one function exist at a time. ``w`` are leaves that f reads by itself, the weights of a module.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.third_order import wanted

Tensors = tuple[Tensor, ...]
Found = list[Tensor | None]
"""Gradients; None where no path leads to an input."""
Ambient = Callable[[], AbstractContextManager[None]]


class Again(Protocol):
    """What computes tensors of tensors, as often as it is called.

    Attributes:
        weights: how many of its inputs, the last ones, it reads by itself: it is told them, not given.
    """

    weights: int

    def __call__(self, tensors: Tensors) -> Sequence[Tensor | None]:
        """The outputs, with a graph if gradients are enabled: the tensors are leaves then."""
        ...

    def derivative(self, given: Sequence[int], asked: Sequence[int]) -> "Derivative":
        """The gradient of the outputs ``given`` with respect to the inputs ``asked``."""
        ...


class Derivative:
    """The gradient of a function, as a function: its inputs are the gradients of outputs, then the function's.

    Args:
        of: the function.
        given: which of its outputs have a gradient.
        asked: which of its inputs' gradients are computed.
        ambient: a context to differentiate in.
    """

    def __init__(self, of: Again, given: Sequence[int], asked: Sequence[int], ambient: Ambient):
        self.of, self.given, self.asked = of, given, asked
        self.weights, self.ambient = of.weights, ambient

    def __call__(self, tensors: Tensors) -> Sequence[Tensor | None]:
        twice = torch.is_grad_enabled()
        if not twice:
            tensors = leaves(tensors, self.weights)
        grads, inputs = tensors[: len(self.given)], tensors[len(self.given) :]
        with torch.enable_grad():
            return self.differentiate(inputs, grads, twice)

    def differentiate(self, inputs: Tensors, grads: Tensors, twice: bool) -> Found:
        """The gradients of the function at ``inputs``, leaves; with a graph if ``twice``."""
        outputs = self.of(inputs)
        with self.ambient():
            return self.gradients(outputs, [inputs[i] for i in self.asked], grads, twice)

    def gradients(
        self, outputs: Sequence[Tensor | None], by: list[Tensor], grads: Tensors, twice: bool
    ) -> Found:
        """The gradients of the function's ``outputs`` with respect to ``by``."""
        if not by:
            return []
        # what has a gradient is an output of a graph: not None
        of: list[Any] = [outputs[i] for i in self.given]
        return list(torch.autograd.grad(of, by, grads, create_graph=twice, allow_unused=True))

    def derivative(self, given: Sequence[int], asked: Sequence[int]) -> "Derivative":
        return Derivative(self, given, asked, self.ambient)

    def finish(self, made: Sequence[Tensor | None]) -> None:
        """Called with what a call returned, as outputs of its node."""


def leaves(tensors: Tensors, weights: int) -> Tensors:
    """The tensors without what made them; the last ones are weights, and leaves already."""
    given, told = tensors[: len(tensors) - weights], tensors[len(tensors) - weights :]
    return (*(x.detach().requires_grad_() if x.requires_grad else x for x in given), *told)


def node(f: Again, made: Sequence[Tensor], tensors: Tensors) -> tuple[Tensor, ...]:
    """``made``, which is ``f(tensors)``, as outputs of one node of the graph; those without a gradient have none."""
    return _Node.apply(f, made, *tensors)  # pyright: ignore[reportReturnType]


class _Node(torch.autograd.Function):
    """The node of a call. It keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, f: Again, made: Sequence[Tensor] | None, *tensors: Tensor) -> Any:
        given = len(tensors) - f.weights
        ctx.f, ctx.told = f, tensors[given:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:given])
        if made is None:
            return tuple(f(tensors))
        outputs = [x.detach() for x in made]
        ctx.mark_non_differentiable(
            *(y for x, y in zip(made, outputs, strict=True) if not x.requires_grad)
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors = (*ctx.saved_tensors, *ctx.told)
        given = [i for i, grad in enumerate(grads) if grad is not None]
        asked = [i for i, runs in enumerate(wanted(ctx, tensors)) if runs]
        found: Found = [None] * len(tensors)
        if given:
            derivative = ctx.f.derivative(given, asked)
            made: Any = _Node.apply(derivative, None, *(grads[i] for i in given), *tensors)
            derivative.finish(made)
            for i, grad in zip(asked, made[: len(asked)], strict=True):
                found[i] = grad
        return None, None, *found
