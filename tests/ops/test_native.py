"""GELU and LayerNorm whose first order is PyTorch's own, as on a GPU; here on CPU tensors."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.ops import autograd, native, reference


class Unrecorded:
    """In place of recorded calls, which need Triton's launcher."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def ready(self, *args):
        return None


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(autograd, "_on_gpu", lambda x: True)
    monkeypatch.setattr(autograd, "replayed", Unrecorded)


@pytest.fixture
def ran(monkeypatch):
    """The names of the kernels of PyTorch's that ran."""
    names: list[str] = []

    def noted(name, function):
        def run(*args, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        return run

    for name in ("_gelu", "_gelu_backward", "_layer_norm", "_layer_norm_backward"):
        monkeypatch.setattr(native, name, noted(name, getattr(native, name)))
    return names


def numbers(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_to_second_order(approximate, ran):
    x = numbers(3, 4)
    gradcheck(lambda x: dvf.gelu(x, approximate), x)
    assert gradgradcheck(lambda x: dvf.gelu(x, approximate), x)
    assert {"_gelu", "_gelu_backward"} <= set(ran)


@pytest.mark.parametrize("parameters", [0, 1, 2])
@pytest.mark.parametrize("axes", [1, 2])
def test_layer_norm_to_second_order(parameters, axes, ran):
    x = numbers(3, 2, 4)
    shape = x.shape[-axes:]
    given = [numbers(*shape) for _ in range(parameters)]

    def norm(x, *parameters):
        return dvf.layer_norm(x, shape, *parameters)

    gradcheck(norm, (x, *given))
    assert gradgradcheck(norm, (x, *given))
    assert {"_layer_norm", "_layer_norm_backward"} <= set(ran)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_of_layer_norm_only_what_is_asked_for(asked):
    inputs = [numbers(3, 4), numbers(4), numbers(4)]
    dy = torch.ones(3, 4, dtype=torch.float64)
    leaves = [inputs[i] for i in asked]
    ours = grad(dvf.layer_norm(inputs[0], 4, *inputs[1:]), leaves, dy)
    theirs = grad(F.layer_norm(inputs[0], (4,), *inputs[1:]), leaves, dy)
    torch.testing.assert_close(ours, theirs)


def test_a_bias_alone_and_parameters_of_another_dtype_are_ours(ran):
    x, bias = numbers(3, 4), numbers(4)
    torch.testing.assert_close(dvf.layer_norm(x, 4, None, bias), F.layer_norm(x, (4,), None, bias))
    ran.clear()
    grad(dvf.layer_norm(x, 4, None, bias).sum(), (x, bias))
    half = x.detach().bfloat16().requires_grad_()
    weight = numbers(4, dtype=torch.float32)
    grad(dvf.layer_norm(half, 4, weight).sum(), (half, weight))
    assert ran == []


def test_first_order_alone_runs_no_kernel_of_ours(ran, monkeypatch):
    x, weight, bias = numbers(3, 4), numbers(4), numbers(4)
    refused = pytest.fail
    for name in ("gelu", "layer_norm"):
        module = __import__(f"diversevit_fast.ops.{name}", fromlist=[name])
        for order in ("_forward", "_backward"):
            monkeypatch.setattr(getattr(module, order), "_function", lambda *_: refused("ours"))
    y = dvf.gelu(dvf.layer_norm(x, 4, weight, bias))
    y.sum().backward()
    with torch.no_grad():
        dvf.gelu(dvf.layer_norm(x, 4, weight, bias))
    assert len(ran) == 6


def test_a_chosen_backend_is_what_runs(ran):
    x = numbers(3, 4)
    with dvf.use_backend("reference"):
        dvf.gelu(x).sum().backward()
    with dvf.use_backend("cpu"):
        y = dvf.gelu(x)
        grad(y.sum(), x)
    assert ran == []


def test_the_backend_may_change_between_forward_and_backward():
    x, weight, bias = numbers(3, 4), numbers(4), numbers(4)
    dy = numbers(3, 4)
    wanted = grad(F.layer_norm(x, (4,), weight, bias), (x, weight, bias), dy, create_graph=True)
    wanted += grad(wanted[0].square().sum(), (x, weight, dy))
    for backend in ("cpu", "reference"):
        y = dvf.layer_norm(x, 4, weight, bias)
        with dvf.use_backend(backend):
            got = grad(y, (x, weight, bias), dy, create_graph=True)
            got += grad(got[0].square().sum(), (x, weight, dy))
        torch.testing.assert_close(got, wanted)


def test_a_hessian_vector_product_by_double_backward():
    """What is differentiated here is the double backward, by way of its cotangent and of what the forward saved."""
    x, weight, zeros = numbers(2, 4), numbers(4), torch.zeros(2, 4, dtype=torch.float64)
    zeros.requires_grad_()

    def slope(f):
        (first,) = grad(f(x, weight), x, zeros, create_graph=True)
        (second,) = grad(first, zeros, numbers(2, 4), create_graph=True)
        return grad(second.sin().sum(), (x, weight))

    torch.testing.assert_close(
        slope(lambda x, w: dvf.layer_norm(x, 4, w)),
        slope(lambda x, w: reference.layer_norm(x, (4,), w, None, 1e-5)),  # F.layer_norm's is wrong
    )


@pytest.mark.parametrize("f", [dvf.gelu, lambda x: dvf.layer_norm(x, 4)])
def test_batched_cotangents_and_functional_transforms(f):
    x = numbers(3, 4)
    eye = torch.eye(12, dtype=torch.float64).view(12, 3, 4)
    batched = grad(f(x), x, eye, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, torch.func.jacrev(f)(x).view(12, 3, 4))
    plain = F.gelu if f is dvf.gelu else lambda x: F.layer_norm(x, (4,))
    torch.testing.assert_close(
        torch.func.hessian(lambda x: f(x).sin().sum())(x),
        torch.func.hessian(lambda x: plain(x).sin().sum())(x),
    )
