"""Hessian-vector products by reverse mode alone, of every operator, and derivatives of any order of its formula."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional, grad
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import diversevit_fast as dvf
from diversevit_fast import UnsupportedError
from diversevit_fast.ops import reference
from diversevit_fast.ops.attention_qkvpacked import split_qkv
from diversevit_kernels.common.contracts import AttentionDoubleBackward
from diversevit_kernels.cpu import attention as cpu
from tests.helpers.attention_cases import CASES, as_function, differentiable, operands
from tests.helpers.eager import softmax_attention
from tests.helpers.versions import compiles_losses
from tests.helpers.vits import VITS, diverse_vit, images_for, labels_for, timm_vit

Function = Callable[..., Any]


def _numbers(*shape: int) -> Tensor:
    seed = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=seed, dtype=torch.float64)


def _flat(f: Function) -> Function:
    """All results of ``f`` as one vector."""

    def joined(*x: Tensor) -> Tensor:
        result = f(*x)
        results = result if isinstance(result, tuple) else (result,)
        return torch.cat([y.flatten() for y in results])

    return joined


def _attention(name: str) -> tuple[Function, Function, tuple[Tensor, ...]]:
    case = CASES[name]
    *tensors, causal = operands(case)
    ours, plain = (as_function(case, tensors[3], causal, f) for f in (None, reference.attention))
    return ours, plain, differentiable(*tensors)


ATTENTION = {
    f"attention {name}": _attention(name)
    for name in CASES
    if name not in ("one-token", "width-first", "no-dense-axis", "qkv-projection")
}
OPERATORS: dict[str, tuple[Function, Function, tuple[Tensor, ...]]] = ATTENTION | {
    "attention of a projection": (
        dvf.attention_qkvpacked,
        lambda qkv: reference.attention(*split_qkv(qkv)).transpose(1, 2),
        (_numbers(1, 3, 3, 2, 2),),
    ),
    "layer_norm": (
        lambda x, w, b: dvf.layer_norm(x, 4, w, b),
        lambda x, w, b: reference.layer_norm(x, (4,), w, b),
        (_numbers(3, 4), _numbers(4), _numbers(1, 4)[0]),
    ),
    "layer_norm without parameters": (
        lambda x: dvf.layer_norm(x, (2, 2)),
        lambda x: reference.layer_norm(x, (2, 2)),
        (_numbers(3, 2, 2),),
    ),
    "gelu": (dvf.gelu, reference.gelu, (_numbers(5),)),
    "gelu tanh": (
        lambda x: dvf.gelu(x, approximate="tanh"),
        lambda x: reference.gelu(x, "tanh"),
        (_numbers(5),),
    ),
    "head_penalty": (
        dvf.head_penalty,
        lambda g: reference.head_penalty(g)[0],
        (_numbers(1, 3, 2, 3),),
    ),
    "head_penalty by sample, with cosines": (
        lambda g: dvf.head_penalty(g, granularity="sample", return_cosines=True),
        lambda g: reference.head_penalty(g, "sample"),
        (_numbers(2, 3, 2, 2),),
    ),
    "cosines alone": (
        lambda g: dvf.head_penalty(g, return_cosines=True)[1],
        lambda g: reference.head_penalty(g)[1],
        (_numbers(1, 3, 2, 3),),
    ),
    "routed_head_penalty": (
        lambda r, w: dvf.routed_head_penalty(r, w, return_cosines=True),
        reference.routed_head_penalty,
        (_numbers(1, 2, 3, 2, 2), _numbers(3, 2, 2, 3)),
    ),
}


def _vectors(inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=g, dtype=x.dtype) for x in inputs)


def _leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in inputs)


def _loss(f: Function) -> Function:
    return lambda *x: (f(*x).sin() * 2).sum()


def by_hvp(f, x):
    return functional.hvp(_loss(f), x, _vectors(x, 1))[1]


def by_vhp(f, x):
    return functional.vhp(_loss(f), x, _vectors(x, 1))[1]


def by_hessian(f, x):
    return [h for row in functional.hessian(_loss(f), x) for h in row]


def by_vectorized_hessian(f, x):
    return [h for row in functional.hessian(_loss(f), x, vectorize=True) for h in row]


def by_hvp_of_some(f, x):
    """With respect to one input; the others want gradients of their own."""
    first, *rest = _leaves(x)
    return [functional.hvp(lambda y: _loss(f)(y, *rest), first, _vectors(x, 1)[0])[1]]


def by_derivative_of_hvp_in_its_vector(f, x):
    v = _leaves(_vectors(x, 1))
    products = functional.hvp(_loss(f), x, v, create_graph=True)[1]
    return grad([(p * p).sum() for p in products], v)


def by_derivative_of_jvp(f, x):
    x, v = _leaves(x), _leaves(_vectors(x, 1))
    product = functional.jvp(f, x, v, create_graph=True)[1]
    return grad(product.sin().sum(), (*x, *v), allow_unused=True, materialize_grads=True)


def by_backward_of_jvp(f, x):
    x = _leaves(x)
    functional.jvp(f, x, _vectors(x, 1), create_graph=True)[1].sin().sum().backward()
    return [torch.zeros_like(y) if y.grad is None else y.grad for y in x]


def by_jvp_of_jvp(f, x):
    """The second directional derivative, of which (52) is made."""
    a, u = _vectors(x, 1), _vectors(x, 2)
    return [functional.jvp(lambda *y: functional.jvp(f, y, a, create_graph=True)[1], x, u)[1]]


def by_mixed_derivative(f, x):
    """Of a Hessian-vector product in what is after the operator, again by (52)."""
    w = _vectors((f(*x),), 3)[0].requires_grad_()
    products = functional.hvp(
        lambda *y: (w * f(*y).sin()).sum(), x, _vectors(x, 1), create_graph=True
    )
    return grad([p.sin().sum() for p in products[1]], w)


def by_jvp_of_grad(f, x):
    gradient = torch.func.grad(_loss(f), tuple(range(len(x))))
    return torch.func.jvp(gradient, x, _vectors(x, 1))[1]


def by_vjp_of_grad(f, x):
    gradient = torch.func.grad(_loss(f), tuple(range(len(x))))
    return torch.func.vjp(gradient, *x)[1](_vectors(x, 1))


def by_nested_vjps(f, x):
    """``functional.jvp`` and its derivative, of ``torch.func``."""
    v = _vectors(x, 1)

    def slope(*y: Tensor) -> Tensor:
        out, pull = torch.func.vjp(f, *y)
        return torch.func.vjp(pull, torch.zeros_like(out))[1](v)[0]

    return torch.func.grad(lambda *y: slope(*y).sin().sum(), tuple(range(len(x))))(*x)


def by_hvp_of_nested_vjps(f, x):
    """``functional.hvp`` of ``torch.func``."""
    gradient = torch.func.grad(_loss(f), tuple(range(len(x))))
    pull = torch.func.vjp(gradient, *x)[1]
    zeros = tuple(map(torch.zeros_like, x))
    return torch.func.vjp(pull, zeros)[1](_vectors(x, 1))[0]


def by_batch_of_hvps(f, x):
    """Of several vectors at once, ``torch.func.vmap`` over the nested pull-backs."""
    gradient = torch.func.grad(_loss(f), tuple(range(len(x))))

    def product(*v: Tensor) -> Any:
        pull = torch.func.vjp(gradient, *x)[1]
        return torch.func.vjp(pull, tuple(map(torch.zeros_like, x)))[1](v)[0]

    pairs = zip(_vectors(x, 1), _vectors(x, 2), strict=True)
    return torch.func.vmap(product)(*map(torch.stack, pairs))


WAYS = {name.removeprefix("by_"): f for name, f in globals().items() if name.startswith("by_")}


def _flattened(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [y for x in results for y in _flattened(x)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivatives_however_they_are_asked_for(operator, way):
    ours, plain, inputs = OPERATORS[operator]
    got, wanted = (_flattened(WAYS[way](_flat(f), inputs)) for f in (ours, plain))
    assert any(x.any() for x in wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def _derivative(f: Function, x: tuple[Tensor, ...], order: int) -> tuple[Tensor, ...]:
    """By every input of a number made of all derivatives before."""
    x = _leaves(x)
    value = _loss(f)(*x)
    for _ in range(order - 1):
        value = value + sum((g * g).sum() for g in grad(value, x, create_graph=True))
    return grad(value, x)


def by_three_gradients(f, x):
    _derivative(f, x, 3)


def by_three_gradients_in_one_input(f, x):
    first, *rest = _leaves(x)
    _derivative(lambda y: f(y, *rest), (first,), 3)


def by_backward_of_hvp(f, x):
    x = _leaves(x)
    products = functional.hvp(_loss(f), x, _vectors(x, 1), create_graph=True)[1]
    sum(p.sum() for p in products).backward()


def by_backward_of_vhp(f, x):
    x = _leaves(x)
    products = functional.vhp(_loss(f), x, _vectors(x, 1), create_graph=True)[1]
    sum(p.sum() for p in products).backward()


def by_gradient_of_hvp_in_an_input(f, x):
    x = _leaves(x)
    products = functional.hvp(_loss(f), x, _vectors(x, 1), create_graph=True)[1]
    grad(sum(p.sum() for p in products), x[0])


def by_hessian_of_jvp(f, x):
    v = _vectors(x, 1)

    def slope(*y: Tensor) -> Tensor:
        return functional.jvp(f, y, v, create_graph=True)[1].sin().sum()

    functional.hessian(slope, x)


def by_gradient_of_nested_vjps(f, x):
    v = _vectors(x, 1)
    every = tuple(range(len(x)))

    def product(*y: Tensor) -> Tensor:
        pull = torch.func.vjp(torch.func.grad(_loss(f), every), *y)[1]
        return torch.cat([p.flatten() for p in pull(v)]).sin().sum()

    torch.func.grad(product, every)(*x)


THIRD = {name: f for name, f in globals().items() if name.startswith("by_")}
THIRD = {name.removeprefix("by_"): f for name, f in THIRD.items() if f not in WAYS.values()}


@pytest.mark.parametrize("way", THIRD)
@pytest.mark.parametrize("operator", OPERATORS)
def test_third_derivatives_are_refused(operator, way):
    f, _, inputs = OPERATORS[operator]
    with pytest.raises(UnsupportedError, match="not three times") as refusal:
        THIRD[way](_flat(f), inputs)
    assert "\n" not in str(refusal.value)
    assert "dvf.use_backend('reference')" in str(refusal.value)
    with dvf.use_backend("reference"):
        THIRD[way](_flat(f), inputs)


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_order_on_the_reference(operator, order):
    ours, plain, inputs = OPERATORS[operator]
    with dvf.use_backend("reference"):
        got = _derivative(_flat(ours), inputs, order)
    torch.testing.assert_close(got, _derivative(_flat(plain), inputs, order))


def _standardised(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5):
    """``F.layer_norm`` of the last axis; PyTorch's own has a wrong derivative of ``functional.jvp``."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight + bias


class Formulas(TorchFunctionMode):
    """Plain attention and LayerNorm, differentiable to any order, in place of PyTorch's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        options = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return softmax_attention(*args[:3], options.get("attn_mask"))
        return (_standardised if func is F.layer_norm else func)(*args, **options)


@pytest.mark.parametrize("order", [3, 4])
def test_any_order_is_pytorchs(order):
    """The judge of the plain formulas is PyTorch's softmax, moments and GELU."""
    q, k, v = operands(CASES["plain"])[:3]
    x, w, b = OPERATORS["layer_norm"][2]
    pairs = [
        (dvf.attention, softmax_attention, (q, k, v)),
        (OPERATORS["layer_norm"][0], lambda x, w, b: _standardised(x, (4,), w, b), (x, w, b)),
        (dvf.gelu, F.gelu, (x,)),
        (OPERATORS["gelu tanh"][0], lambda x: F.gelu(x, approximate="tanh"), (x,)),
    ]
    for ours, theirs, inputs in pairs:
        with dvf.use_backend("reference"):
            got = _derivative(ours, inputs, order)
        torch.testing.assert_close(got, _derivative(theirs, inputs, order))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_backend_that_changes_between_forward_and_backward(operator):
    """What the reference recorded is of any order; what others did is so to second order, on the reference too."""
    f, plain, inputs = OPERATORS[operator]
    f, wanted = _flat(f), _derivative(_flat(plain), inputs, 3)

    def recorded(*x: Tensor) -> Tensor:
        with dvf.use_backend("reference"):
            return f(*x)

    torch.testing.assert_close(_derivative(recorded, inputs, 3), wanted)
    x = _leaves(inputs)
    y = _loss(f)(*x)
    with dvf.use_backend("reference"):
        first = sum((g * g).sum() for g in grad(y, x, create_graph=True))
        second = grad(y + first, x, create_graph=True)
        torch.testing.assert_close(second, _derivative(_flat(plain), inputs, 2))
        with pytest.raises(UnsupportedError, match="forward and backward inside"):
            grad(sum((g * g).sum() for g in second), x)


@pytest.mark.parametrize(
    "f", [dvf.attention, OPERATORS["attention of a projection"][0]], ids=["", "packed"]
)
def test_nothing_of_the_reference_is_in_a_hessian_vector_product(f, monkeypatch):
    """O(N) memory: (52) alone takes the plain formula."""
    monkeypatch.setattr(reference, "attention", None)
    inputs = operands(CASES["plain"])[:3] if f is dvf.attention else (_numbers(1, 3, 3, 2, 2),)
    WAYS["hvp"](f, inputs)
    WAYS["derivative_of_jvp"](f, inputs)
    with pytest.raises(TypeError):
        WAYS["jvp_of_jvp"](f, inputs)


CONTEXTS: dict[str, Callable[[nn.Module], Any]] = {
    "HeadDiversity": dvf.HeadDiversity,
    "all layers": lambda model: dvf.HeadDiversity(model, layers="all", wrt="output"),
    "fraction": lambda model: dvf.HeadDiversity(model, layers="all", fraction=0.5),
    "capture_heads": dvf.capture_heads,
    "maps": lambda model: dvf.capture_heads(model, maps="class"),
    "keep_heads": lambda model: dvf.keep_heads(model, {2: [0], 0: [1, 2]}),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("vit", VITS)
@pytest.mark.parametrize("way", ["hvp", "derivative_of_jvp"])
def test_a_model_inside_a_context(vit, context, way):
    model = VITS[vit]()
    images, entered = images_for(model), CONTEXTS[context](model)

    def loss(images: Tensor) -> Tensor:
        with entered:
            return F.cross_entropy(model(images), labels_for(images))[None]

    def plain_loss(images: Tensor) -> Tensor:
        if context == "keep_heads":
            return loss(images)
        return F.cross_entropy(model(images), labels_for(images))[None]

    with Formulas():
        got = WAYS[way](loss, (images,))
    with dvf.use_backend("reference"), Formulas():
        wanted = WAYS[way](plain_loss, (images,))
    torch.testing.assert_close(_flattened(got), _flattened(wanted))


@pytest.mark.parametrize("way", ["hvp", "derivative_of_jvp"])
def test_all_parameters_of_a_model(way):
    model = timm_vit(depth=1)
    diversity, images = dvf.HeadDiversity(model), images_for(model, 2)
    names, values = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)

    def loss(*values: Tensor) -> Tensor:
        with diversity:
            logits = functional_call(model, dict(zip(names, values, strict=True)), images)
        return F.cross_entropy(logits, labels_for(images))[None]

    with Formulas():
        got = WAYS[way](loss, values)
        with dvf.use_backend("reference"):
            wanted = WAYS[way](loss, values)
    torch.testing.assert_close(_flattened(got), _flattened(wanted))


def _penalised(model: nn.Module, wrt: str) -> tuple[Function, tuple[Tensor, ...]]:
    """Cross-entropy and penalty as a function of the classifier's parameters."""
    diversity, images = dvf.HeadDiversity(model, layers="all", wrt=wrt), images_for(model)

    def loss(weight: Tensor) -> Tensor:
        with diversity:
            logits = functional_call(model, {"head.weight": weight}, images)
        return F.cross_entropy(logits, labels_for(images)) + 100 * diversity.penalty(logits)

    return lambda x: loss(x)[None], (model.head.weight.detach(),)


@pytest.mark.parametrize("wrt", ["input", "output"])
@pytest.mark.parametrize("vit", [diverse_vit, timm_vit])
@pytest.mark.parametrize("way", ["hvp", "vhp", "derivative_of_jvp"])
def test_a_penalty_in_what_comes_after_the_attention(vit, wrt, way):
    """The operators are linear in it, so that this is a second derivative of each."""
    got = WAYS[way](*_penalised(vit(), wrt))
    with dvf.use_backend("reference"):
        wanted = WAYS[way](*_penalised(vit(), wrt))
    torch.testing.assert_close(_flattened(got), _flattened(wanted))


@pytest.mark.parametrize("vit", [diverse_vit, timm_vit])
def test_a_penalty_in_what_comes_before_is_a_third_derivative(vit):
    model = vit()
    diversity = dvf.HeadDiversity(model, layers="all")

    def penalty(images: Tensor) -> Tensor:
        with diversity:
            logits = model(images)
        return diversity.penalty(logits)

    images = images_for(model, 2)
    with pytest.raises(UnsupportedError, match="not three times"):
        functional.hvp(penalty, images, torch.ones_like(images))
    with dvf.use_backend("reference"):
        product = functional.hvp(penalty, images, torch.ones_like(images))[1]
        h = 1e-4
        above, below = (
            grad(penalty(x), x)[0] for x in ((images + e).requires_grad_() for e in (h, -h))
        )
    torch.testing.assert_close(product, (above - below) / (2 * h), rtol=1e-4, atol=1e-8)


def test_the_modules():
    def module(attention: nn.Module, norm: nn.Module, act: nn.Module) -> Function:
        return lambda x: act(norm(attention(x)))

    torch.manual_seed(0)
    ours = dvf.nn.MultiHeadAttention(6, 2), dvf.nn.LayerNorm(6), dvf.nn.GELU()
    f = module(*(m.double() for m in ours))
    x = (_numbers(2, 3, 6),)
    for way in WAYS.values():
        got = _flattened(way(f, x))
        with dvf.use_backend("reference"):
            torch.testing.assert_close(got, _flattened(way(f, x)))


def test_a_derivative_in_a_mask_of_one_that_was_not():
    """The first in the queries alone: what the backward was not asked for, the double backward may be."""
    q, k, v, mask, _ = operands(CASES["additive-full"])

    def mixed(attend: Function) -> Tensor:
        def slope(q: Tensor, mask: Tensor) -> Tensor:
            return torch.func.grad(lambda q: attend(q, k, v, mask).sin().sum())(q).square().sum()

        return torch.func.grad(slope, 1)(q, mask)

    torch.testing.assert_close(mixed(dvf.attention), mixed(reference.attention))


@compiles_losses
def test_inside_a_compiled_loss():
    def product(q: Tensor, zeros: Tensor, v: Tensor) -> Tensor:
        first = grad(dvf.attention(q, q, q).sin().sum(), q, create_graph=True)[0]
        second = grad(first, q, zeros, create_graph=True)[0]
        return grad(second, zeros, v)[0]

    def slope(q: Tensor, zeros: Tensor, v: Tensor) -> Tensor:
        pulled = grad(dvf.attention(q, q, q), q, zeros, create_graph=True)[0]
        return grad(pulled, zeros, v, create_graph=True)[0].sin().sum()

    q, zeros = _leaves((_numbers(1, 2, 3, 2), torch.zeros(1, 2, 3, 2, dtype=torch.float64)))
    v = _vectors((q,), 1)[0]
    torch._dynamo.reset()
    compiled = dvf.compile_loss(product, backend="aot_eager")
    torch.testing.assert_close(compiled(q, zeros, v), product(q, zeros, v))
    compiled = dvf.compile_loss(slope, backend="aot_eager")
    got, wanted = (grad(f(q, zeros, v), q)[0] for f in (compiled, slope))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_gpu_keeps_belongs_to_its_cotangent(packed, monkeypatch):
    """The backward's dq goes with the ``do`` that it was made of, and with no other."""
    module = importlib.import_module(
        "diversevit_fast.ops." + ("attention_qkvpacked" if packed else "attention")
    )
    seen, double_backward = [], cpu.attention_double_backward

    def spy(inputs: AttentionDoubleBackward, **options: Any) -> Any:
        seen.append(inputs.dq)
        return double_backward(inputs, **options)

    monkeypatch.setattr(cpu, "attention_double_backward", spy)
    q, k, v = _leaves(operands(CASES["plain"])[:3])
    x = (torch.stack([q, k, v]).permute(1, 3, 0, 2, 4),) if packed else (q, k, v, None)
    forward = module.attention_qkvpacked_operator if packed else module.attention_operator
    o, *kept = forward(*x, None, False, 0.5, 0.0)
    do, dq = torch.ones_like(o), torch.zeros_like(x[0])
    directions = (torch.ones_like(x[0]).requires_grad_(), *((None,) * (0 if packed else 3)))
    flags = (False, 0.5, 0.0) if packed else (False, 0.5, 0.0, False)
    results = module._double_backward(*x, None, o.detach(), *kept, do, dq, *directions, *flags)
    given = seen.pop()
    grad(results[0].sum(), directions[0], retain_graph=True)  # (50), with do
    again = seen.pop()
    grad(results[1 if packed else 3].sum(), x[0])  # (51), with another
    assert given is not None
    assert again is not None
    assert seen == [None]
