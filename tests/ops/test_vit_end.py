"""The end of a ViT as one node of autograd's graph: the numbers of the operators, to any order that they have."""

import pytest
import torch

from diversevit_fast.errors import UnsupportedError
from diversevit_fast.ops.vit_end import Options, Weights, by_operators, vit_end

B, N, H, d, D, M, C = 2, 3, 2, 2, 4, 5, 3
OPTIONS = Options("none", 1e-5, 1e-6)


def inputs(frozen=()):
    torch.manual_seed(0)
    shapes = ((D, H * d), (D,), (D,), (D,), (M, D), (M,), (D, M), (D,), (D,), (D,), (C, D), (C,))
    made = [torch.randn(shape, dtype=torch.float64) for shape in ((B, D), (B, N, 3, H, d), *shapes)]
    return [x.requires_grad_(i not in frozen) for i, x in enumerate(made)]


def node(x, qkv, *weights):
    return vit_end(x, qkv, Weights(*weights), OPTIONS)


def operators(*given):
    return by_operators(*given, OPTIONS)[0]


def test_first_and_second_derivatives_are_right():
    given = inputs()
    assert torch.autograd.gradcheck(node, given)
    assert torch.autograd.gradgradcheck(node, given)


def penalised(f, given, asked=(1,), through=lambda logits: logits):
    """Gradients of a loss with a term of the gradients of ``asked``, as a penalty is one."""
    logits = f(*given)
    score = through(logits)
    grads = torch.autograd.grad(
        score, [given[i] for i in asked], torch.cos(score.detach()), create_graph=True
    )
    loss = logits.square().sum() + sum((g**3).sum() for g in grads)
    return torch.autograd.grad(loss, [x for x in given if x.requires_grad])


@pytest.mark.parametrize("frozen", [(), (0,), (0, *range(2, 14)), (2, 4, 9, 12), (3, 6, 8, 10, 13)])
@pytest.mark.parametrize("asked", [(1,), (0, 1), (1, 8), (0,)], ids=str)
def test_the_numbers_of_the_operators(frozen, asked):
    given = inputs(frozen=[i for i in frozen if i not in asked])
    for softmax in (lambda x: x, lambda x: x.softmax(-1)):
        ours, theirs = (penalised(f, given, asked, softmax) for f in (node, operators))
        for mine, expect in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expect)


@pytest.mark.parametrize("asked", [(1,), (0, 1)], ids=str)
def test_a_third_derivative_is_refused_and_what_is_none_is_not(asked):
    given = inputs()

    def gradient(f):
        logits = f(*given)
        return torch.autograd.grad(logits.cos().sum(), [given[i] for i in asked], create_graph=True)

    ours, theirs = gradient(node), gradient(operators)
    for grads in (ours, theirs):
        again = torch.autograd.grad(
            sum((g**3).sum() for g in grads), given, create_graph=True, allow_unused=True
        )
        with pytest.raises(UnsupportedError, match="not three times"):
            sum(g.sum() for g in again if g is not None).backward()

    # a Hessian-vector product by two reverse modes is linear in its vector
    def along(f):
        v = torch.ones_like(given[1]).requires_grad_()
        (g,) = torch.autograd.grad(f(*given).square().sum(), given[1], create_graph=True)
        (hv,) = torch.autograd.grad((g * v).sum(), given[1], create_graph=True)
        return torch.autograd.grad(hv.square().sum(), v)[0]

    torch.testing.assert_close(along(node), along(operators))


@pytest.mark.parametrize("again", [False, True])
def test_batched_gradients(again):
    given, batch = inputs(), torch.eye(B * C, dtype=torch.float64).view(-1, B, C)

    def jacobians(f):
        options = {"is_grads_batched": True, "create_graph": again}
        return torch.autograd.grad(f(*given), given, batch, **options)

    for mine, expect in zip(jacobians(node), jacobians(operators), strict=True):
        torch.testing.assert_close(mine, expect)


def test_the_gradient_of_a_gradient_alone():
    """The logits then have no gradient of their own."""
    for f in (node, operators):
        given = inputs()
        (g,) = torch.autograd.grad(f(*given).sum(), given[1], create_graph=True)
        (g**3).sum().backward()
        made = [x.grad for x in given]
        assert made[-1] is None
        if f is node:
            ours = made
    for mine, expect in zip(ours, made, strict=True):
        torch.testing.assert_close(mine, expect)
