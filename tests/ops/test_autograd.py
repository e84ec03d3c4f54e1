"""Who wants to see an operator sees it: dispatch modes, profilers and every kind of tensor that is not plain."""

import pytest
import torch
from torch.profiler import profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import diversevit_fast as dvf

OPERATORS = ["diversevit::gelu", "diversevit::gelu_backward", "diversevit::gelu_double_backward"]


def _to_second_order(x: torch.Tensor) -> None:
    (dx,) = torch.autograd.grad(dvf.gelu(x).sum(), x, create_graph=True)
    dx.square().sum().backward()


def test_a_dispatch_mode():
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Watch():
        _to_second_order(torch.randn(5, requires_grad=True))
    assert [name for name in seen if name.startswith("diversevit")] == OPERATORS


@pytest.mark.filterwarnings("ignore")
def test_a_profiler():
    with profile() as found:
        _to_second_order(torch.randn(5, requires_grad=True))
    assert set(OPERATORS) <= {event.key for event in found.key_averages()}


@pytest.mark.filterwarnings("ignore")
def test_a_tracer():
    traced = torch.jit.trace(dvf.gelu, torch.randn(5))
    x = torch.randn(5)
    assert torch.equal(traced(x), dvf.gelu(x))


def test_a_tensor_subclass():
    x, y = torch.randn(5), torch.randn(5)
    both = dvf.gelu(TwoTensor(x, y))
    assert torch.equal(both.a, dvf.gelu(x))
    assert torch.equal(both.b, dvf.gelu(y))


def test_a_tensor_that_is_negated_when_it_is_read():
    x = torch.complex(torch.randn(5), torch.randn(5)).conj().imag
    assert x.is_neg()
    assert torch.equal(dvf.gelu(x), dvf.gelu(x.clone()))
    lazy, eager = x.detach().requires_grad_(), x.clone().requires_grad_()
    _to_second_order(lazy)
    _to_second_order(eager)
    assert torch.equal(lazy.grad, eager.grad)


def test_nobody(monkeypatch):
    """Then the operator's function runs without its dispatcher, recorded all the same."""
    from diversevit_fast.ops import gelu

    def refuse(*_):
        raise AssertionError("through the dispatcher")

    import sys

    module = sys.modules[gelu.__module__]
    for order in (module._forward, module._backward, module._double_backward):
        monkeypatch.setattr(order._operator, "_opoverload", refuse)
    _to_second_order(torch.randn(5, requires_grad=True))
    with torch.no_grad():
        dvf.gelu(torch.randn(5, requires_grad=True))
    with torch.inference_mode():
        assert dvf.gelu(torch.randn(5)).is_inference()
