"""Gradients of ``torch.func`` mapped over samples that themselves require gradients: ensembles, per-sample penalties.

PyTorch's own ``F.layer_norm`` is wrong in this case (2.14.1), so the formulas are written out.
"""

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.ops import reference


def normalised(x, shape, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias


def attend(operator):
    return lambda x: operator(x, 2 * x, x.sin())


def normalise(operator):
    return lambda x: operator(x, (8,), x[0, 0, 0], x[0, 0, 1])


CASES = {
    "attention": (attend(dvf.attention), attend(reference.attention)),
    "layer_norm": (normalise(dvf.layer_norm), normalise(normalised)),
    "gelu": (dvf.gelu, torch.nn.functional.gelu),
}


def results(function, x):
    """First and second derivatives of each sample, and autograd's derivatives of these."""

    def value(x):
        return function(x).pow(2).sum()

    def penalty(x):
        return torch.func.grad(value)(x).square().sum()

    x = x.clone().requires_grad_()
    mapped = [torch.func.vmap(torch.func.grad(f))(x) for f in (value, penalty)]
    return [*mapped, *torch.autograd.grad(mapped[0].square().sum(), x)]


@pytest.mark.parametrize(("ours", "formula"), CASES.values(), ids=CASES)
def test_grad_inside_vmap_inside_autograd(ours, formula):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, 5, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(results(ours, x), results(formula, x), rtol=1e-9, atol=1e-9)


def test_an_ensemble_inside_second_order():
    torch.manual_seed(0)
    made = [
        torch.nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True).double().eval()
        for _ in range(3)
    ]
    parameters, buffers = torch.func.stack_module_state(made)
    x = torch.randn(2, 4, 8, dtype=torch.float64)

    def penalty(parameters, buffers, model=made[0]):
        def value(x):
            return torch.func.functional_call(model, (parameters, buffers), (x,)).pow(3).sum()

        return torch.func.grad(value)(x).square().sum()

    with dvf.second_order():
        mapped = torch.func.vmap(torch.func.grad(penalty))(parameters, buffers)
        one = torch.func.grad(penalty)(
            *({n: y[1] for n, y in p.items()} for p in (parameters, buffers))
        )
    for name, wanted in one.items():
        torch.testing.assert_close(mapped[name][1], wanted, rtol=1e-9, atol=1e-9)
