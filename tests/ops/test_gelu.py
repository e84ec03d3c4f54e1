"""GELU equals its definition to second order, at any shape, layout and dtype it accepts."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import GeluBackward, GeluDoubleBackward
from diversevit_kernels.cpu.gelu import blocked
from diversevit_kernels.cpu.gelu import dispatch as cpu
from diversevit_kernels.cpu.gelu import native as gelu_native
from tests.helpers.second_order import TAILS, WAYS

ops = importlib.import_module("diversevit_fast.ops.gelu")

SHAPES = {"scalar": (), "vector": (7,), "tokens": (2, 3, 4), "one": (1, 1), "four": (2, 2, 3, 2)}
LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "slice": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, 0)[::2, ..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORMS = ("none", "tanh")


def randn(shape, dtype=torch.float64, seed=0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture(params=["native", "one-chunk", "small-chunks"])
def chunk(request, monkeypatch):
    """C++ where it is compiled; chunks of the size users get, and so small that the loop runs several times."""
    if request.param != "native":
        monkeypatch.setattr(gelu_native, "supports", lambda x: False)
    if request.param == "small-chunks":
        monkeypatch.setattr(blocked, "CHUNK_ELEMENTS", 3)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_first_and_second_derivative(shape, form, chunk):
    x = randn(shape).requires_grad_()
    assert gradcheck(lambda x: dvf.gelu(x, form), x)
    assert gradgradcheck(lambda x: dvf.gelu(x, form), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_in_every_layout(layout, form, chunk):
    def f(x):
        return dvf.gelu(LAYOUTS[layout](x), form)

    x = randn((2, 3, 4)).requires_grad_()
    assert gradcheck(f, x)
    assert gradgradcheck(f, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_equals_pytorch(layout, dtype, form):
    x = LAYOUTS[layout](randn((3, 5, 4), dtype))
    ours = dvf.gelu(x, form)
    assert ours.is_contiguous()
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, F.gelu(x, approximate=form))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
def test_every_way_of_asking_twice(way, tail, form):
    inputs = [randn((2, 3, 4))]
    expect = WAYS["autograd.grad"](lambda x: F.gelu(x, approximate=form), inputs, TAILS[tail])
    actual = WAYS[way](lambda x: dvf.gelu(x, form), inputs, TAILS[tail])
    torch.testing.assert_close(list(actual), list(expect), rtol=1e-10, atol=1e-10)


def all_orders(kernels, x, dy, ddx, form):
    """Every result of the three orders, in order."""
    second = kernels.gelu_double_backward(GeluDoubleBackward(x, dy, ddx, form))
    return [
        kernels.gelu_forward(x, form),
        kernels.gelu_backward(GeluBackward(x, dy, form)),
        *second,
    ]


def check_orders(x, dy, ddx, form, kernels=cpu):
    exact = all_orders(reference, x.double(), dy.double(), ddx.double(), form)
    plain = all_orders(reference, x, dy, ddx, form)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = all_orders(kernels, x, dy, ddx, form)
    finally:
        torch.use_deterministic_algorithms(False)
    # sums of a few terms, in float32; a half result is rounded once, after them
    terms = 16 if x.dtype == torch.float32 else 1
    for ours, eager, truth in zip(actual, plain, exact, strict=True):
        assert ours.dtype == eager.dtype
        assert_within_budget(ours, eager, truth, terms=terms)


def triple(shape, dtype, layout="dense", seed=0, scale=1.5):
    return [LAYOUTS[layout](randn(shape, dtype, seed + i, scale)) for i in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_within_budget(layout, dtype, form, chunk):
    check_orders(*triple((3, 5, 4), dtype, layout), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vit_sizes_within_budget(dtype, form):
    check_orders(*triple((1, 197, 1536), dtype), form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_within_budget_on_lesser_processors(dtype, form, lesser_processor):
    assert lesser_processor("gelu")
    check_orders(*triple((1, 197, 153), dtype), form)


def test_finite_at_the_ends(form):
    x = torch.tensor([0.0, 12, -12, 41, -41, 3e30, -3e30, float("inf"), -float("inf")])
    a = torch.full((9,), 2.0)
    gx, gdy = cpu.gelu_double_backward(GeluDoubleBackward(x, torch.ones(9), a, form))
    torch.testing.assert_close(gx[3:], torch.zeros(6))
    torch.testing.assert_close(gdy[:-2], torch.tensor([1.0, 2, 0, 2, 0, 2, 0]))
    assert torch.equal(
        cpu.gelu_backward(GeluBackward(torch.tensor([torch.nan]), a[:1], form)).isnan(),
        torch.tensor([True]),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([1, 2, 3, 17, 40]), min_size=2, max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(FORMS),
    st.integers(0, 2**31),
    st.sampled_from([0.01, 1.0, 2.0]),
    st.sampled_from([None, 5, 1 << 17]),
)
def test_any_shape_within_budget(shape, dtype, layout, form, seed, scale, chunk):
    with pytest.MonkeyPatch.context() as patch:
        if chunk:
            patch.setattr(gelu_native, "supports", lambda x: False)
            patch.setattr(blocked, "CHUNK_ELEMENTS", chunk)
        check_orders(*triple(tuple(shape), dtype, layout, seed, scale), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager_pytorch(dtype, form):
    low = triple((4, 33, 64), dtype)

    def to_second_order(gelu, x, dy, ddx):
        x, dy = x.requires_grad_(), dy.requires_grad_()
        y = gelu(x, approximate=form)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return [t.detach() for t in (y, dx, *torch.autograd.grad(dx, (x, dy), ddx))]

    exact = to_second_order(F.gelu, *(t.double() for t in low))
    results = (to_second_order(f, *(t.detach() for t in low)) for f in (dvf.gelu, F.gelu))
    for ours, eager, truth in zip(*results, exact, strict=True):
        assert_within_budget(ours, eager, truth, terms=16 if dtype == torch.float32 else 1)


def test_runs_give_the_same_bits(form, monkeypatch):
    monkeypatch.setattr(blocked, "CHUNK_ELEMENTS", 100)
    inputs = triple((3, 65, 16), torch.float32)
    one, two = (all_orders(cpu, *inputs, form) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Sabotaged:
    """The CPU kernels with one named mistake."""

    gelu_forward = staticmethod(cpu.gelu_forward)

    def __init__(self, mistake):
        self.mistake = mistake

    def gelu_backward(self, inputs):
        x, dy, form = inputs
        dx = cpu.gelu_backward(inputs)
        if self.mistake == "unwritten row":
            dx[-1] = torch.nan
        if self.mistake == "dx without x phi":
            dx = dy * (reference.gelu(x, form) / x)
        return dx

    def gelu_double_backward(self, inputs):
        x, dy, ddx, form = inputs
        gx, gdy = cpu.gelu_double_backward(inputs)
        if self.mistake == "last chunk dropped":
            gx[-1] = 0
        if self.mistake == "cotangents swapped":
            gdy = cpu.gelu_backward(GeluBackward(x, dy, form))
        if self.mistake == "the other form":
            gx, _ = cpu.gelu_double_backward(
                GeluDoubleBackward(x, dy, ddx, {"none": "tanh", "tanh": "none"}[form])
            )
        if self.mistake == "a term of y'' dropped":
            k, c = reference.TANH_SCALE, reference.TANH_CUBIC
            t = (k * (x + c * x**3)).tanh()
            second = 2 * (-(x**2) / 2).exp() / (2 * torch.pi) ** 0.5
            second = (1 - t**2) * k * (1 + 6 * c * x**2) if form == "tanh" else second
            gx = ddx * dy * second
        return gx, gdy


MISTAKES = [
    "unwritten row",
    "dx without x phi",
    "last chunk dropped",
    "cotangents swapped",
    "the other form",
    "a term of y'' dropped",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_bites(mistake, form):
    inputs = triple((5, 16), torch.float32)
    check_orders(*inputs, form, kernels=Sabotaged("none"))
    with pytest.raises(AssertionError):
        check_orders(*inputs, form, kernels=Sabotaged(mistake))


class TestLaws:
    """What must hold whatever the numbers are."""

    def test_odd_part_is_half_of_x(self, form):
        """y(x) - y(-x) = x, hence y'(x) + y'(-x) = 1 and y'' is even."""
        x = randn((50,)).requires_grad_()
        (dx,) = torch.autograd.grad(dvf.gelu(x, form).sum(), x, create_graph=True)
        (gx,) = torch.autograd.grad(dx.sum(), x)
        back = (-x).detach().requires_grad_()
        (dx_back,) = torch.autograd.grad(dvf.gelu(back, form).sum(), back, create_graph=True)
        (gx_back,) = torch.autograd.grad(dx_back.sum(), back)
        torch.testing.assert_close(dvf.gelu(x, form) - dvf.gelu(back, form), x)
        torch.testing.assert_close(dx + dx_back, torch.ones_like(x))
        torch.testing.assert_close(gx, gx_back)

    def test_second_derivative_at_zero_is_twice_the_density(self, form):
        x, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        gx, gdy = cpu.gelu_double_backward(GeluDoubleBackward(x, one, one, form))
        assert gx.item() == pytest.approx(2 * (2 * torch.pi) ** -0.5, rel=1e-12)
        assert gdy.item() == 0.5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_far_out_it_is_a_straight_line(self, dtype, form):
        """No overflow on the way: 0 and 1 exactly, where powers of x are infinite."""
        x = torch.tensor([-1e38, -1e20, -1e8, -50.0, 50.0, 1e8, 1e20, 1e38], dtype=dtype)
        gx, _ = cpu.gelu_double_backward(
            GeluDoubleBackward(x, torch.ones_like(x), torch.ones_like(x), form)
        )
        assert torch.equal(gx, torch.zeros_like(x))


def test_saved_are_the_input_and_the_cotangent(form):
    x, dy = (randn((4, 5)).requires_grad_() for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch.autograd.grad(dvf.gelu(x, form), x, dy, create_graph=True)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), x.data_ptr(), dy.data_ptr()]


class TestFunctorch:
    """torch.func and forward mode agree with the definition, or raise."""

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, x: torch.func.jacrev(f)(x),
            lambda f, x: torch.func.jacrev(torch.func.jacrev(lambda y: f(y).sin().sum()))(x),
            lambda f, x: torch.func.grad(
                lambda z: torch.func.grad(lambda y: f(y).sin().sum())(z).square().sum()
            )(x),
            lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
            lambda f, x: torch.func.hessian(lambda y: f(y).sin().sum())(x),
            lambda f, x: torch.func.vmap(f, in_dims=1, out_dims=1)(x),
            lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y).sin().sum()), 2)(x),
            lambda f, x: torch.func.vmap(torch.func.vmap(f, 1), 1)(x),
            lambda f, x: torch.func.vmap(torch.func.vjp(f, x)[1])(torch.stack([x, 2 * x]))[0],
        ],
        ids=[
            "jacrev",
            "jacrev twice",
            "grad of grad",
            "jvp",
            "hessian",
            "vmap",
            "per-sample",
            "vmap twice",
            "vmap over cotangents",
        ],
    )
    def test_transform(self, transform, form):
        x = randn((2, 3, 4))
        ours, plain = (
            transform(lambda x, f=f: f(x, approximate=form), x) for f in (dvf.gelu, reference.gelu)
        )
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)

    def test_batched_cotangents(self):
        x, basis = randn((2, 3)).requires_grad_(), torch.eye(6, dtype=torch.float64).view(6, 2, 3)
        ours, theirs = (
            torch.autograd.grad(f(x), x, basis, is_grads_batched=True) for f in (dvf.gelu, F.gelu)
        )
        torch.testing.assert_close(ours, theirs)

    def test_forward_mode_over_a_recorded_backward_refuses(self):
        x = randn((2, 4)).requires_grad_()
        y = dvf.gelu(x)
        with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
            torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_third_derivative_refuses(form):
    x, grad = randn((5,)).requires_grad_(), torch.autograd.grad
    first = grad(dvf.gelu(x, form).sum(), x, create_graph=True)[0]
    second = grad(first.sum(), x, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match=r"twice.*use_backend\('reference'\)"):
        grad(second.sum(), x)


def test_compiled_forward_has_its_gradient_and_refuses_a_second(form):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dvf.gelu(x, form), backend="aot_eager", fullgraph=True)
    x = randn((2, 4)).requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(x).sin().sum(), x)
        for f in (compiled, lambda x: F.gelu(x, approximate=form))
    )
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match=r"double backward|donated buffers"):
        WAYS["backward"](compiled, [x], TAILS["linear"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contracts(layout, dtype, form):
    x, dy, ddx = triple((2, 3, 4), dtype, layout)
    torch.library.opcheck(ops.gelu_double_backward_operator, (x, dy, ddx, form))
    x, dy = x.requires_grad_(), dy.requires_grad_()
    torch.library.opcheck(ops.gelu_operator, (x, form))
    torch.library.opcheck(ops.gelu_backward_operator, (x, dy, form))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_autocast_dtypes_are_pytorchs(dtype, device):
    """No GPU needed: fake tensors carry dtypes through PyTorch's autocast rules and through ours."""
    torch.set_autocast_enabled(device, True)
    try:
        with FakeTensorMode():
            x = torch.empty(2, 4, device=device, dtype=dtype)
            ours, theirs = dvf.gelu(x), F.gelu(x)
    finally:
        torch.set_autocast_enabled(device, False)
    assert ours.dtype == theirs.dtype


def test_second_order_under_autocast():
    x = randn((3, 4), torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (dx,) = torch.autograd.grad(dvf.gelu(x.bfloat16()).sum(), x, create_graph=True)
        (gx,) = torch.autograd.grad(dx.square().sum(), x)
    (want,) = torch.autograd.grad(F.gelu(x).sum(), x, create_graph=True)
    (expect,) = torch.autograd.grad(want.square().sum(), x)
    torch.testing.assert_close(gx, expect, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
def test_nothing_to_compute(shape):
    x = torch.randn(shape, requires_grad=True)
    (dx,) = torch.autograd.grad(dvf.gelu(x).sum(), x, create_graph=True)
    (gx,) = torch.autograd.grad(dx.square().sum(), x)
    assert dx.shape == gx.shape == x.shape


@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_backends_agree(name, form):
    inputs = [randn((2, 3, 4))]
    with dvf.use_backend(name):
        actual = WAYS["backward"](lambda x: dvf.gelu(x, form), inputs, TAILS["nonlinear"])
    expect = WAYS["backward"](lambda x: reference.gelu(x, form), inputs, TAILS["nonlinear"])
    torch.testing.assert_close(actual, expect)


BAD = {
    "not a tensor": (lambda x: ([1.0],), "x: expected a tensor, got list"),
    "integer": (lambda x: (x.long(),), "x: expected a floating dtype, got torch.int64"),
    "sparse": (lambda x: (x.to_sparse(),), "x: expected a dense strided tensor"),
    "form": (lambda x: (x, "fast"), "approximate: expected one of 'none', 'tanh', got 'fast'"),
    "no form": (lambda x: (x, None), "approximate: expected one of 'none', 'tanh', got None"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    change, message = BAD[name]
    with pytest.raises(UsageError) as failure:
        dvf.gelu(*change(randn((2, 3))))
    assert str(failure.value).startswith(message), failure.value
    assert "\n" not in str(failure.value)
    assert "; " in str(failure.value)
