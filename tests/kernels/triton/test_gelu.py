"""The Triton GELU kernels equal the definition, to second order, and write where they should."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import diversevit_fast as dvf
from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import GeluBackward, GeluDoubleBackward
from tests.helpers.layouts import LAYOUTS
from tests.helpers.second_order import TAILS, WAYS
from tests.kernels.triton.conftest import INTERPRETED
from tools.interpreter.sanitizer import sanitizer

kernels = pytest.importorskip("diversevit_kernels.triton.gelu.kernels")
launching = pytest.importorskip("diversevit_kernels.triton.runtime.launch")

MIXED = [(kind,) * 3 for kind in LAYOUTS] + [
    ("transposed", "dense", "no-dense-axis"),
    ("dense", "expanded", "features-first"),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(params=["none", "tanh"])
def form(request):
    return request.param


def triple(shape, dtype, kinds=("dense",) * 3, seed=0, scale=1.5, device="cpu"):
    """x, dy, ddx."""
    g = torch.Generator().manual_seed(seed)
    made = (scale * torch.randn(shape, generator=g, dtype=torch.float64) for _ in kinds)
    return [LAYOUTS[kind](t.to(device, dtype)) for kind, t in zip(kinds, made, strict=True)]


def results_of(operator, x, dy, ddx, form):
    """The results of forward, backward and double backward, in order."""
    second = operator.gelu_double_backward(GeluDoubleBackward(x, dy, ddx, form))
    return [
        operator.gelu_forward(x, form),
        operator.gelu_backward(GeluBackward(x, dy, form)),
        *second,
    ]


TERMS = {torch.float32: 16, torch.float64: 1 << 16}
"""Sums of a few terms; a half result is rounded once, after them. In float64 the definition's own
1 - T^2 has cancelled, times u'^2 and the cotangents."""


def check_results(inputs, form, operator=kernels, guards=None):
    """All results within the error budget, dense, and no input written to."""
    exact = results_of(reference, *(t.double() for t in inputs), form)
    plain = results_of(reference, *inputs, form)
    given = inputs if guards is None else [guards.place(t) for t in inputs]
    before = [t.clone() for t in given]
    for ours, eager, truth in zip(results_of(operator, *given, form), plain, exact, strict=True):
        assert ours.dtype == eager.dtype
        assert ours.is_contiguous()
        assert_within_budget(ours, eager, truth, terms=TERMS.get(ours.dtype, 1))
    assert all(torch.equal(one, two) for one, two in zip(given, before, strict=True))


@pytest.mark.parametrize("kinds", MIXED, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_within_budget(kinds, dtype, form, device, guarded):
    check_results(triple((3, 5, 4), dtype, kinds, device=device), form, guards=guarded)


@pytest.mark.parametrize("shape", [(), (1,), (31,), (32,), (33,), (577, 3), (2, 197, 8)], ids=str)
def test_sizes(shape, form, device, guarded):
    """Below, at and above a tile of 32 elements."""
    check_results(triple(shape, torch.float32, device=device), form, guards=guarded)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 17]), min_size=2, max_size=4),
    dtype=st.sampled_from(DTYPES),
    kinds=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    form=st.sampled_from(["none", "tanh"]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.01, 1.0, 2.0]),
)
def test_any_shape_within_budget(shape, dtype, kinds, form, seed, scale, device, guarded):
    inputs = triple(tuple(shape), dtype, kinds, seed, scale, device)
    check_results(inputs, form, guards=guarded)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
def test_first_and_second_derivative(shape, form, device):
    x = triple(shape, torch.float64, device=device)[0].requires_grad_()
    with dvf.use_backend("triton"):
        assert gradcheck(lambda x: dvf.gelu(x, form), x)
        assert gradgradcheck(lambda x: dvf.gelu(x, form), x)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_twice(way, tail, form, device):
    inputs = triple((3, 4), torch.float64, device=device)[:1]
    with dvf.use_backend("triton"):
        ours = WAYS[way](lambda x: dvf.gelu(x, form), inputs, TAILS[tail])
    exact = WAYS["autograd.grad"](lambda x: reference.gelu(x, form), inputs, TAILS[tail])
    torch.testing.assert_close(list(ours), list(exact), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_out_it_is_a_straight_line(dtype, form, device):
    """No overflow on the way: 0 and 1 exactly, where powers of x are infinite."""
    top = torch.finfo(dtype).max
    x = torch.tensor([-top, -1e4, -50.0, 50.0, 1e4, top], dtype=dtype, device=device)
    one, step = torch.ones_like(x), (x > 0).to(dtype)
    y, dx, gx, gdy = results_of(kernels, x, one, one, form)
    assert torch.equal(y, x * step)
    assert torch.equal(dx, step)
    assert torch.equal(gdy, step)
    assert torch.equal(gx, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_cancellation_in_the_tail_of_tanh(dtype, device):
    """1 - T^2 and 1 + T keep their relative accuracy where T rounds to -1."""
    x = torch.linspace(-6, -2, 41, dtype=torch.float64, device=device).to(dtype)
    one, wide = torch.ones_like(x), x.double()
    _, _, gx, gdy = results_of(kernels, x, one, one, "tanh")
    k, c = reference.TANH_SCALE, reference.TANH_CUBIC
    u, slope = k * (wide + c * wide**3), k * (1 + 3 * c * wide**2)
    e = (2 * u).exp()  # (1 + T) / 2 = e / (1 + e)
    first = e / (1 + e) + 2 * e / (1 + e) ** 2 * wide * slope
    second = (1 + 6 * c * wide**2) * k - wide * u.tanh() * slope**2
    tight = {torch.float32: 2e-4, torch.float64: 1e-11}[dtype]
    torch.testing.assert_close(gdy.double(), first, rtol=tight, atol=0)
    torch.testing.assert_close(gx.double(), 4 * e / (1 + e) ** 2 * second, rtol=tight, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_no_cancellation_in_the_tail_of_the_normal(dtype, device):
    """Where x Phi(x) as 1 + erf is wrong by its own size: relative errors grow with the exponent's rounding only."""
    x = torch.linspace(-12, -1, 221, dtype=torch.float64, device=device).to(dtype)
    one, wide = torch.ones_like(x), x.double()
    density = (-(wide**2) / 2).exp() / (2 * torch.pi) ** 0.5
    phi = torch.special.erfc(-wide / 2**0.5) / 2
    exact = [wide * phi, phi + wide * density, density * (2 - wide**2), phi + wide * density]
    for ours, truth in zip(results_of(kernels, x, one, one, "none"), exact, strict=True):
        info = torch.finfo(dtype)
        share = 5e-7 + 1.2e-7 * wide**2 + (info.eps if info.bits == 16 else 0)
        # near a zero of y' or y'' its two terms are what is rounded
        terms = density * (wide**2).clamp(min=2) if truth is not exact[0] else truth.abs()
        assert (
            (ours.double() - truth).abs() <= share * terms + info.smallest_normal * info.eps
        ).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # -inf times 0
def test_infinities_are_as_far_out(form, device):
    x = torch.tensor([torch.inf, -torch.inf], device=device)
    one = torch.ones_like(x)
    y, *slopes = results_of(kernels, x, one, one, form)
    assert y[0] == torch.inf
    assert y[1].isnan()  # as eager's
    assert [z.tolist() for z in slopes] == [[1, 0], [0, 0], [1, 0]]


def test_not_a_number_stays_one(form, device):
    x = torch.tensor([torch.nan, 1.0], device=device)
    one = torch.ones_like(x)
    for result in results_of(kernels, x, one, one, form):
        assert result.isnan().tolist() == [True, False]


@pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter")
@pytest.mark.parametrize("kinds", MIXED, ids="+".join)
def test_no_access_out_of_bounds(kinds, form, device):
    """Not even a load whose value is thrown away, nor one from a gap of a strided view."""
    inputs = triple((3, 5, 4), torch.float32, kinds, device=device)
    with sanitizer():
        results_of(kernels, *inputs, form)


def test_runs_give_the_same_bits(form, device):
    inputs = triple((3, 65), torch.float32, device=device)
    one, two = (results_of(kernels, *inputs, form) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kinds", MIXED, ids="+".join)
def test_no_layout_is_copied(kinds, device):
    inputs = triple((2, 3, 4), torch.float32, kinds, device=device)
    with launching.recording(run=False) as launches:
        kernels.gelu_double_backward(GeluDoubleBackward(*inputs, "none"))
    (only,) = launches
    read = [(a.ptr.data_ptr(), a.ptr.stride()) for a in only.args[:3]]
    assert read == [(t.data_ptr(), t.stride()) for t in inputs]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
def test_nothing_to_compute(shape, form, device):
    x = torch.zeros(shape, device=device)
    with launching.recording(run=True) as launches:
        results = results_of(kernels, x, x, x, form)
    assert not launches
    assert all(result.shape == shape for result in results)


@pytest.mark.overflow
def test_offsets_beyond_two_to_the_31(device):
    """Strides whose products overflow 32 bits."""
    plain = triple((3, 12), torch.float16, device=device)
    room = torch.empty(2**31 + 2**10, dtype=torch.float16, device=device)  # touched where used
    far = room.as_strided((3, 12), (2**30 + 7, 1))
    for place in range(3):
        moved = [far.copy_(t) if i == place else t for i, t in enumerate(plain)]
        for one, two in zip(
            results_of(kernels, *moved, "none"), results_of(kernels, *plain, "none"), strict=True
        ):
            assert torch.equal(one, two)


class Sabotaged:
    """The kernels with one named mistake."""

    def __init__(self, mistake):
        self.mistake = mistake

    def gelu_forward(self, x, form):
        y = kernels.gelu_forward(x, form)
        return y.relu() if self.mistake == "negative part of y dropped" else y

    def gelu_backward(self, inputs):
        x, dy, form = inputs
        dx = kernels.gelu_backward(inputs)
        if self.mistake == "unwritten row":
            dx[-1] = torch.nan
        if self.mistake == "dx without x phi":
            dx = dy * (reference.gelu(x, form) / x)
        return dx

    def gelu_double_backward(self, inputs):
        x, dy, ddx, form = inputs
        gx, gdy = kernels.gelu_double_backward(inputs)
        if self.mistake == "last element dropped":
            gx[-1, -1] = 0
        if self.mistake == "cotangents swapped":
            gdy = kernels.gelu_backward(GeluBackward(x, dy, form))
        if self.mistake == "the other form":
            other = {"none": "tanh", "tanh": "none"}[form]
            gx, _ = kernels.gelu_double_backward(GeluDoubleBackward(x, dy, ddx, other))
        if self.mistake == "a term of y'' dropped":
            gx = gx + ddx * dy * x**2 * (-(x**2) / 2).exp() / (2 * torch.pi) ** 0.5
        return gx, gdy


MISTAKES = ["negative part of y dropped", "unwritten row", "dx without x phi"]
MISTAKES += ["last element dropped", "cotangents swapped", "the other form"]
MISTAKES += ["a term of y'' dropped"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_bites(mistake, form, device):
    inputs = triple((5, 16), torch.float32, device=device)
    check_results(inputs, form, operator=Sabotaged("none"))
    with pytest.raises(AssertionError):
        check_results(inputs, form, operator=Sabotaged(mistake))


@pytest.mark.parametrize("order", ["forward", "backward", "double_backward"])
def test_the_oracle_sees_a_last_tile_dropped(order, device, monkeypatch):
    """One program too few."""

    def short(plan, kernel, grid, *args, **constants):
        fewer = (lambda c: grid(c) - 1) if plan.table.name == f"gelu_{order}" else grid
        launching.run_kernel(plan, kernel, fewer, *args, **constants)

    monkeypatch.setattr(kernels, "run_kernel", short)
    with pytest.raises(AssertionError, match="non-finite"):
        check_results(triple((5, 16), torch.float32, device=device), "none")


def test_what_no_kernel_takes_is_refused_in_one_line(device):
    x = torch.zeros(2, 4, device=device)
    for tensors in ((x.to(torch.float8_e4m3fn), x), (x, x.to(torch.float8_e4m3fn))):
        with pytest.raises(NotImplementedError, match="float8") as refusal:
            kernels.gelu_backward(GeluBackward(*tensors, "none"))
        assert "\n" not in str(refusal.value)
