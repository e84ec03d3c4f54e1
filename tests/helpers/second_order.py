"""Every way of asking for the gradient of a loss that holds a gradient, for any function of tensors."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Tensor]

TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.sum,  # the treacherous one: its cotangent carries no graph
    "nonlinear": lambda o: o.sin().sum(),
}


def penalised_loss(
    f: Function, inputs: Sequence[Tensor], tail: Callable[[Tensor], Tensor]
) -> Tensor:
    """The value plus a function of its own gradient: what training with a penalty differentiates."""
    value = tail(f(*inputs))
    inner = torch.autograd.grad(value, inputs, create_graph=True)
    return value + sum((g.square() * (i + 1)).sum() for i, g in enumerate(inner))


def _leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs]


def by_autograd_grad(f, inputs, tail):
    inputs = _leaves(inputs)
    return torch.autograd.grad(penalised_loss(f, inputs, tail), inputs)


def by_backward(f, inputs, tail):
    inputs = _leaves(inputs)
    penalised_loss(f, inputs, tail).backward()
    return [x.grad for x in inputs]


def by_backward_inputs(f, inputs, tail):
    inputs = _leaves(inputs)
    penalised_loss(f, inputs, tail).backward(inputs=inputs)
    return [x.grad for x in inputs]


def by_inner_backward(f, inputs, tail):
    """The inner gradient by ``backward(create_graph=True)``, which PyTorch warns about."""
    inputs = _leaves(inputs)
    value = tail(f(*inputs))
    torch.autograd.backward(value, create_graph=True, inputs=inputs)
    inner = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    total = value + sum((g.square() * (i + 1)).sum() for i, g in enumerate(inner))
    return torch.autograd.grad(total, inputs)


def by_functorch(f, inputs, tail):
    which = tuple(range(len(inputs)))

    def total(*x):
        inner, value = torch.func.grad_and_value(lambda *y: tail(f(*y)), argnums=which)(*x)
        return value + sum((g.square() * (i + 1)).sum() for i, g in enumerate(inner))

    return torch.func.grad(total, argnums=which)(*(x.detach() for x in inputs))


def by_checkpoint(f, inputs, tail):
    inputs = _leaves(inputs)
    return by_autograd_grad(lambda *x: checkpoint(f, *x, use_reentrant=False), inputs, tail)


def by_compiled_loss(f, inputs, tail):
    """The whole loss in one graph, with Dynamo tracing autograd.grad."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("PyTorch 2.11 and later trace autograd.grad")
    torch._dynamo.reset()
    inputs = _leaves(inputs)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        loss = torch.compile(
            lambda *x: penalised_loss(f, x, tail), backend="aot_eager", fullgraph=True
        )
        return torch.autograd.grad(loss(*inputs), inputs)


WAYS = {
    "autograd.grad": by_autograd_grad,
    "backward": by_backward,
    "backward(inputs=)": by_backward_inputs,
    "inner backward(create_graph=True)": by_inner_backward,
    "torch.func": by_functorch,
    "checkpoint": by_checkpoint,
    "compiled whole loss": by_compiled_loss,
}
