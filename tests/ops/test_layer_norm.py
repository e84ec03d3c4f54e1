"""LayerNorm equals its definition to second order, at any shape, layout and dtype it accepts."""

import importlib
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import LayerNormBackward, LayerNormDoubleBackward
from diversevit_kernels.cpu.layer_norm import blocked
from diversevit_kernels.cpu.layer_norm import dispatch as cpu
from diversevit_kernels.cpu.layer_norm import native as layer_norm_native
from tests.helpers.second_order import TAILS, WAYS

ops = importlib.import_module("diversevit_fast.ops.layer_norm")


class Case(NamedTuple):
    """``parameters``: which of weight and bias; ``cotangents``: which of ddx, ddw, ddb are present."""

    shape: tuple[int, ...] = (2, 3, 4)
    axes: int = 1
    parameters: str = "wb"
    layout: str = "dense"
    cotangents: str = "xwb"
    eps: float = 1e-5


CASES = {
    "tokens": Case(),
    "no-lead": Case(shape=(5,)),
    "one-feature": Case(shape=(3, 1), eps=0.1),
    "two-features": Case(shape=(3, 2), eps=0.1),
    "two-axes": Case(shape=(2, 3, 2, 2), axes=2),
    "every-axis": Case(shape=(2, 3), axes=2),
    "weight-only": Case(parameters="w"),
    "bias-only": Case(parameters="b"),
    "no-parameters": Case(parameters=""),
    "transposed": Case(layout="transposed"),
    "no-dense-axis": Case(layout="slice"),
    "expanded": Case(layout="expanded", eps=0.1),
    "behind-class-token": Case(layout="patches"),
    "large-eps": Case(eps=0.5),
}
CANCELLING = {"one-feature", "two-features"}
"""Normalized to 0 or nearly +-1 whatever x is, so that gradients are differences of equal numbers."""
COTANGENTS = {f"dd{c}": Case(cotangents=c) for c in ("x", "w", "b", "xw", "xb", "wb")}

LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "slice": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "patches": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def operands(case, dtype=torch.float64, seed=0):
    """x (dense), weight, bias; the latter None where the case has none."""
    g = torch.Generator().manual_seed(seed)
    normalized = case.shape[len(case.shape) - case.axes :]
    x, w, b = (
        torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in (case.shape, normalized, normalized)
    )
    return x, w if "w" in case.parameters else None, b if "b" in case.parameters else None


def as_function(case, norm=dvf.layer_norm):
    """The case's function of the tensors to differentiate, layout included."""

    def f(x, *parameters):
        given = iter(parameters)
        w, b = (next(given) if name in case.parameters else None for name in "wb")
        normalized = x.shape[x.ndim - case.axes :]
        return norm(LAYOUTS[case.layout](x), normalized, w, b, case.eps)

    return f


def present(*tensors):
    return [t for t in tensors if t is not None]


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture
def chunks_only(monkeypatch):
    """Nothing of LayerNorm runs in C++."""
    monkeypatch.setattr(layer_norm_native, "supports", lambda x: False)


@pytest.fixture(params=["native", "one-chunk", "small-chunks"])
def chunk(request, monkeypatch):
    """C++ where it is compiled; chunks of the size users get, and so small that the loop runs several times."""
    if request.param != "native":
        request.getfixturevalue("chunks_only")
    if request.param == "small-chunks":
        monkeypatch.setattr(blocked, "CHUNK_ELEMENTS", 9)


def test_first_and_second_derivative(case, chunk):
    inputs = [t.requires_grad_() for t in present(*operands(case))]
    assert gradcheck(as_function(case), inputs)
    assert gradgradcheck(as_function(case), inputs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_equals_pytorch(case, dtype):
    inputs = present(*operands(case, dtype))
    ours, theirs = (as_function(case, norm)(*inputs) for norm in (dvf.layer_norm, F.layer_norm))
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["tokens", "two-axes", "weight-only", "no-parameters"])
def test_every_way_of_asking_twice(name, way, tail):
    inputs = present(*operands(CASES[name]))
    expect = WAYS["autograd.grad"](as_function(CASES[name], F.layer_norm), inputs, TAILS[tail])
    actual = WAYS[way](as_function(CASES[name]), inputs, TAILS[tail])
    torch.testing.assert_close(list(actual), list(expect), rtol=1e-10, atol=1e-10)


@contextmanager
def poisoned_memory():
    """``torch.empty`` and its kin return NaN, so an element left unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def cotangents(case, x, w, b, seed=1):
    """dy, ddx, ddw, ddb; those the case leaves out are None."""
    g = torch.Generator().manual_seed(seed)
    dtype = x.dtype if w is None else w.dtype
    width = x.shape[x.ndim - case.axes :]
    shapes = {"y": x.shape, "x": x.shape, "w": width, "b": width}
    made = {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    dy, ddx = (LAYOUTS[case.layout](made[k].to(x.dtype)) for k in "yx")
    ddw, ddb = made["w"].to(dtype), made["b"].to(dtype)
    asked = case.cotangents
    return (
        dy,
        ddx if "x" in asked else None,
        ddw if w is not None and "w" in asked else None,
        ddb if b is not None and "b" in asked else None,
    )


def all_orders(kernels, case, x, w, b, given):
    """Every result of the three orders, in order; ``x`` is dense, its layout is applied here."""
    x, (dy, *dd), asked = LAYOUTS[case.layout](x), given, (w is not None, b is not None)
    y, mean, rstd = kernels.layer_norm_forward(x, w, b, case.axes, case.eps)
    first = kernels.layer_norm_backward(LayerNormBackward(x, w, mean, rstd, dy, case.axes, *asked))
    second = kernels.layer_norm_double_backward(
        LayerNormDoubleBackward(x, w, mean, rstd, dy, *dd, case.axes, asked[0])
    )
    statistics = torch.stack([mean, 1 / rstd])  # one scale for both: a mean alone may be 0
    return [y, statistics, *first, *second]


def longest_sum(case, dtype):
    """Over rows, of values that hold sums over features; a half result is rounded once, after it."""
    width = torch.Size(case.shape[len(case.shape) - case.axes :]).numel()
    return torch.Size(case.shape).numel() // width + width if dtype == torch.float32 else 1


def check_orders(case, dtype, kernels=cpu, seed=0):
    tensors = operands(case, dtype, seed)
    given = cotangents(case, *tensors)
    wide = [[t if t is None else t.double() for t in group] for group in (tensors, given)]
    exact = all_orders(reference, case, *wide[0], wide[1])
    plain = all_orders(reference, case, *tensors, given)
    with poisoned_memory():
        actual = all_orders(kernels, case, *tensors, given)
    for ours, eager, truth in zip(actual, plain, exact, strict=True):
        assert (ours is None) == (eager is None) == (truth is None)
        if truth is not None:
            assert ours.dtype == eager.dtype
            assert_within_budget(ours, eager, truth, terms=longest_sum(case, ours.dtype))


@pytest.mark.parametrize("name", sorted(CASES.keys() - CANCELLING))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_within_budget(name, dtype, chunk):
    check_orders(CASES[name], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_within_budget_on_lesser_processors(dtype, lesser_processor):
    assert lesser_processor("layer_norm")
    for shape in ((3, 47, 129), (2, 24, 16)):
        check_orders(Case(shape=shape), dtype)


def test_same_bits_on_any_threads():
    case, before = Case(shape=(40, 17, 129)), torch.get_num_threads()
    tensors, found = operands(case, torch.float32), []
    try:
        for threads in (1, 2, 64):
            torch.set_num_threads(threads)
            found.append(all_orders(cpu, case, *tensors, cotangents(case, *tensors)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_feature_has_no_gradient(dtype):
    """Its normalized value is 0 whatever x is: a budget relative to the result would allow nothing."""
    x, w, b = (t.requires_grad_() for t in operands(CASES["one-feature"], dtype))
    y = dvf.layer_norm(x, 1, w, b, 0.1)
    first = torch.autograd.grad(y.sin().sum(), (x, w), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))
    assert torch.equal(y, b.expand_as(y))
    assert max(g.abs().max() for g in (*first, *second)) < 1e-5


@pytest.mark.parametrize("parameters", ["wb", ""], ids=["parameters", "none"])
@pytest.mark.parametrize("name", COTANGENTS)
def test_any_subset_of_cotangents(name, parameters, chunk):
    """Also where no parameter is there to have one: ``ddw`` alone is then no cotangent at all."""
    check_orders(COTANGENTS[name]._replace(parameters=parameters), torch.float32)


@pytest.mark.parametrize("shape", [(2, 197, 384), (1, 577, 129)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vit_sizes_within_budget(shape, dtype):
    check_orders(Case(shape=shape), dtype)


@st.composite
def any_case(draw):
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    sizes = st.sampled_from([1, 2, 3, 7, 16, 33])
    shape = tuple(draw(st.lists(sizes, min_size=2, max_size=4)))
    axes = draw(st.integers(1, len(shape)))
    assume(torch.Size(shape[len(shape) - axes :]).numel() > 6)  # fewer cancel, see above
    assume(layout != "expanded" or axes < len(shape))  # equal features cancel altogether
    return Case(
        shape=shape,
        axes=axes,
        parameters=draw(st.sampled_from(["wb", "w", "b", ""])),
        layout=layout,
        cotangents=draw(st.sampled_from(["xwb", "x", "w", "xb"])),
        eps=draw(st.sampled_from([1e-2, 0.3])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    any_case(), st.sampled_from(DTYPES), st.integers(0, 2**31), st.sampled_from([None, 5, 1 << 17])
)
def test_any_shape_within_budget(case, dtype, seed, chunk):
    with pytest.MonkeyPatch.context() as patch:
        if chunk:
            patch.setattr(layer_norm_native, "supports", lambda x: False)
            patch.setattr(blocked, "CHUNK_ELEMENTS", chunk)
        check_orders(case, dtype, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager_pytorch(dtype):
    """Value, gradients and gradients of a gradient penalty, against PyTorch's in the same dtype."""
    case = Case(shape=(4, 33, 64))
    low = operands(case, dtype)
    wide = [t.double() for t in low]

    def to_second_order(norm, tensors):
        f = as_function(case, norm)
        inputs = [t.detach().requires_grad_() for t in tensors]
        dy, a = (t.to(tensors[0].dtype) for t in cotangents(case, *low)[:2])
        y = f(*inputs)
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0], inputs[:2], a)]

    exact = to_second_order(F.layer_norm, wide)
    for ours, eager, truth in zip(
        to_second_order(dvf.layer_norm, low), to_second_order(F.layer_norm, low), exact, strict=True
    ):
        assert ours.dtype == eager.dtype
        assert_within_budget(
            ours.detach(), eager.detach(), truth.detach(), terms=longest_sum(case, dtype)
        )


def test_runs_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(blocked, "CHUNK_ELEMENTS", 100)
    case = Case(shape=(3, 65, 16))
    tensors = operands(case, torch.float32)
    one, two = (all_orders(cpu, case, *tensors, cotangents(case, *tensors)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Sabotaged:
    """The CPU kernels with one named mistake."""

    layer_norm_forward = staticmethod(cpu.layer_norm_forward)

    def __init__(self, mistake):
        self.mistake = mistake

    def layer_norm_backward(self, inputs):
        dx, dw, db = cpu.layer_norm_backward(inputs)
        if self.mistake == "unwritten row":
            dx.flatten(0, -2)[-1] = torch.nan
        if self.mistake == "last row left out of dw":
            shorter = (t[:-1] if t is not None and t.ndim > 1 else t for t in inputs[:5])
            dw = cpu.layer_norm_backward(LayerNormBackward(*shorter, *inputs[5:]))[1]
        return dx, dw, db

    def layer_norm_double_backward(self, inputs):
        """The formulas again, one term at a time left out."""
        x, w, mean, rstd, dy, a, ddw, ddb, _, _ = inputs
        xh, r = (x - mean[..., None]) * rstd[..., None], rstd[..., None]

        def mean_of(z, unless):
            return z.mean(-1, keepdim=True) * (self.mistake != unless)

        s = r * (a - mean_of(a, "mean(a)") - xh * mean_of(a * xh, "mean(a xh)"))
        g = dy * w
        h = dy * ddw - r * (mean_of(g * xh, "c2") * a + mean_of(a * xh, "a2") * g)
        gx = r * (h - mean_of(h, "mean(h)") - xh * mean_of(h * xh, "mean(h xh)"))
        gx = gx - r * mean_of(g * s, "q") * xh
        gdy = w * s + xh * ddw + ddb * (self.mistake != "ddb")
        if self.mistake == "last chunk dropped":
            gx[-1, -1] = 0
        return gx, (dy * s).flatten(0, -2).sum(0), gdy


MISTAKES = ["unwritten row", "last row left out of dw", "last chunk dropped", "ddb"]
TERMS = ["mean(a)", "mean(a xh)", "c2", "a2", "mean(h)", "mean(h xh)", "q"]


@pytest.mark.parametrize("mistake", MISTAKES + TERMS)
def test_the_oracle_bites(mistake):
    case = Case(shape=(2, 17, 24))
    check_orders(case, torch.float32, kernels=Sabotaged("none"))
    with pytest.raises(AssertionError):
        check_orders(case, torch.float32, kernels=Sabotaged(mistake))


def test_the_oracle_sees_a_chunk_the_loop_forgot(monkeypatch, chunks_only):
    case, chunks = Case(shape=(2, 17, 24)), blocked._chunks
    monkeypatch.setattr(blocked, "CHUNK_ELEMENTS", 100)
    check_orders(case, torch.float32)
    monkeypatch.setattr(blocked, "_chunks", lambda *sizes: list(chunks(*sizes))[:-1])
    with pytest.raises(AssertionError, match="non-finite"):
        check_orders(case, torch.float32)


class TestLaws:
    """What must hold whatever the numbers are, in float64."""

    @pytest.fixture
    def xwb(self):
        return operands(Case(shape=(3, 5, 8)))

    def test_shift_and_scale_of_x_change_nothing(self, xwb):
        x, w, b = xwb
        torch.testing.assert_close(
            dvf.layer_norm(3 * x + 5, 8, w, b, 1e-14), dvf.layer_norm(x, 8, w, b, 1e-14)
        )

    @pytest.mark.parametrize("way", ["backward", "torch.func"])
    def test_relabelling_features_permutes_the_gradients(self, xwb, way):
        order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])

        def norm(x, w, b):
            return dvf.layer_norm(x, 8, w, b)

        plain = WAYS[way](norm, xwb, TAILS["nonlinear"])
        moved = WAYS[way](norm, [t[..., order] for t in xwb], TAILS["nonlinear"])
        torch.testing.assert_close(list(moved), [g[..., order] for g in plain])

    def test_gradients_of_x_sum_to_zero_in_every_row(self, xwb):
        """Because a shift of x changes nothing, to second order."""
        x, w, b = (t.requires_grad_() for t in xwb)
        (dx,) = torch.autograd.grad(dvf.layer_norm(x, 8, w, b).sin().sum(), x, create_graph=True)
        (gx,) = torch.autograd.grad(dx.square().sum(), x)
        for gradient in (dx.detach(), gx):
            assert gradient.abs().max() > 0.1
            torch.testing.assert_close(gradient.sum(-1), torch.zeros(3, 5, dtype=x.dtype))


def test_saved_are_inputs_and_row_statistics():
    x = torch.randn(3, 40, 16, requires_grad=True)
    w, b = (torch.randn(16, requires_grad=True) for _ in range(2))
    dy, saved = torch.randn_like(x).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = dvf.layer_norm(x, 16, w, b)
        torch.autograd.grad(y, (x, w, b), dy, create_graph=True)
    own = {t.data_ptr(): t for t in saved if all(t.data_ptr() != s.data_ptr() for s in (x, w, dy))}
    assert len(saved) == 4 + 5
    assert sorted(t.numel() for t in own.values()) == [120, 120]


class _NewStorages(TorchDispatchMode):
    """Bytes of every storage that an operation made, at its largest."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.kept = {t.untyped_storage()._cdata for t in known}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                self.known.add(t.untyped_storage()._cdata)
                self.kept.append(t.untyped_storage())  # alive, so that no address comes back
        return out


@pytest.mark.parametrize("native", [True, False], ids=["native", "chunks"])
def test_double_backward_makes_two_large_tensors(native, monkeypatch, request):
    """Its results; everything else is the size of a chunk."""
    if not native:
        request.getfixturevalue("chunks_only")
    monkeypatch.setattr(blocked, "CHUNK_ELEMENTS", 256)
    case = Case(shape=(8, 32, 16))
    x, w, b = operands(case, torch.float32)
    dy, *dd = cotangents(case, x, w, b)
    _, mean, rstd = cpu.layer_norm_forward(x, w, b, 1, 1e-5)
    with _NewStorages(x, w, mean, rstd, dy, *dd) as new:
        cpu.layer_norm_double_backward(LayerNormDoubleBackward(x, w, mean, rstd, dy, *dd, 1, True))
    sizes = sorted(s.nbytes() for s in new.kept)
    assert sizes[-2:] == [4 * x.numel()] * 2
    assert sizes[-3] <= 4 * 256 * torch.get_num_threads()


class TestFunctorch:
    """torch.func and forward mode agree with the definition, or raise.

    Not with F.layer_norm: its torch.func.hessian is wrong in the block of weight and x (torch 2.15).
    """

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, *x: torch.func.jacrev(f)(*x),
            lambda f, *x: torch.func.jacrev(
                torch.func.jacrev(lambda *y: f(*y).sin().sum(), argnums=(0, 1)), argnums=(0, 1)
            )(*x),
            lambda f, *x: torch.func.grad(
                lambda z: torch.func.grad(lambda y: f(y, *x[1:]).sin().sum())(z).square().sum()
            )(x[0]),
            lambda f, *x: torch.func.jvp(f, x, x)[1],
            lambda f, *x: torch.func.hessian(lambda *y: f(*y).sin().sum(), argnums=(0, 1))(*x),
            lambda f, *x: torch.func.vmap(f, in_dims=(1, None, None))(*x),
            lambda f, *x: torch.func.vmap(
                torch.func.grad(lambda *y: f(*y).sin().sum(), argnums=(0, 1, 2)), (0, None, None)
            )(*x),
        ],
        ids=["jacrev", "jacrev twice", "grad of grad", "jvp", "hessian", "vmap", "per-sample"],
    )
    def test_transform(self, transform):
        inputs = operands(CASES["tokens"])
        ours, theirs = (
            transform(lambda x, w, b, f=f: f(x, w.shape, w, b), *inputs)
            for f in (dvf.layer_norm, reference.layer_norm)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    def test_batched_cotangents(self):
        inputs = [t.requires_grad_() for t in operands(Case(shape=(2, 4)))]
        basis = torch.eye(8, dtype=torch.float64).view(8, 2, 4)
        ours, theirs = (
            torch.autograd.grad(
                f(inputs[0], (4,), *inputs[1:]), inputs, basis, is_grads_batched=True
            )
            for f in (dvf.layer_norm, F.layer_norm)
        )
        torch.testing.assert_close(ours, theirs)

    def test_forward_mode_over_a_recorded_backward_refuses(self):
        x = torch.randn(2, 4, requires_grad=True)
        y = dvf.layer_norm(x, 4)
        with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
            torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_third_derivative_refuses():
    x, w, b = (t.requires_grad_() for t in operands(CASES["tokens"]))
    grad = torch.autograd.grad
    first = grad(dvf.layer_norm(x, 4, w, b).sin().sum(), x, create_graph=True)[0]
    second = grad(first.square().sum(), x, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match=r"twice.*use_backend\('reference'\)"):
        grad(second.sum(), x)


def test_compiled_forward_has_its_gradient_and_refuses_a_second():
    torch._dynamo.reset()
    case, inputs = CASES["tokens"], operands(CASES["tokens"])
    compiled = torch.compile(lambda *t: as_function(case)(*t), backend="aot_eager", fullgraph=True)
    leaves = [t.detach().requires_grad_() for t in inputs]
    ours, theirs = (
        torch.autograd.grad(f(*leaves).sin().sum(), leaves)
        for f in (compiled, as_function(case, F.layer_norm))
    )
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match=r"double backward|donated buffers"):
        WAYS["backward"](compiled, inputs, TAILS["linear"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tokens", "two-axes", "weight-only", "bias-only", "transposed"])
def test_contracts(name, dtype):
    case = CASES[name]
    x, w, b = operands(case, dtype)
    dy, *dd = cotangents(case, x, w, b)
    x, asked = LAYOUTS[case.layout](x), (w is not None, b is not None)
    _, mean, rstd = ops.layer_norm_operator(x, w, b, case.axes, case.eps)
    check = torch.library.opcheck
    check(
        ops.layer_norm_double_backward_operator,
        (x, w, mean, rstd, dy, *dd, case.axes, asked[0]),
    )
    for t in present(x, w, b, dy):
        t.requires_grad_()
    check(ops.layer_norm_operator, (x, w, b, case.axes, case.eps))
    check(ops.layer_norm_backward_operator, (x, w, mean, rstd, dy, case.axes, *asked))


MIXED = [
    (x, p)
    for x in (*DTYPES, torch.float64)
    for p in ((x, torch.float32) if x in (torch.float16, torch.bfloat16) else (x,))
]


@pytest.mark.parametrize(("dtype", "parameters"), MIXED, ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_pytorchs(dtype, parameters, autocast):
    """Results, gradients and second gradients have the dtypes of F.layer_norm's, under autocast too."""
    x, w, b = operands(Case(shape=(5, 16)), torch.float32)
    inputs = [t.to(d).requires_grad_() for t, d in ((x, dtype), (w, parameters), (b, parameters))]
    results = []
    for norm in (dvf.layer_norm, F.layer_norm):
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            y = norm(inputs[0], (16,), *inputs[1:])
            first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([y, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_gpu_autocast_dtypes_are_pytorchs(dtype):
    """No GPU needed: fake tensors carry dtypes through PyTorch's autocast rules and through ours."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            x = torch.empty(2, 4, device="cuda", dtype=dtype)
            w = torch.empty(4, device="cuda", dtype=torch.promote_types(dtype, torch.float32))
            ours, theirs = dvf.layer_norm(x, 4, w, w), F.layer_norm(x, (4,), w, w)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert ours.dtype == theirs.dtype == w.dtype


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0,)], ids=str)
def test_nothing_to_normalize(shape):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(shape[-1:], requires_grad=True)
    first = torch.autograd.grad(dvf.layer_norm(x, shape[-1], w).sum(), (x, w), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))
    for gx, gw in (first, second):
        assert gx.shape == x.shape
        assert torch.equal(gw, torch.zeros_like(w))


@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_backends_agree(name):
    inputs, f = operands(CASES["tokens"]), as_function(CASES["tokens"])
    with dvf.use_backend(name):
        actual = WAYS["backward"](f, inputs, TAILS["nonlinear"])
    torch.testing.assert_close(
        actual,
        WAYS["backward"](
            as_function(CASES["tokens"], reference.layer_norm), inputs, TAILS["nonlinear"]
        ),
    )


BAD = {
    "not a tensor": (lambda x, w: (x.tolist(), 4), "x: expected a tensor, got list"),
    "integer": (lambda x, w: (x.long(), 4), "x: expected a floating dtype, got torch.int64"),
    "sparse": (lambda x, w: (x.to_sparse(), 4), "x: expected a dense strided tensor"),
    "float size": (lambda x, w: (x, 4.0), "normalized_shape: expected an int or a sequence"),
    "text": (lambda x, w: (x, "4"), "normalized_shape: expected an int or a sequence"),
    "no axes": (lambda x, w: (x, ()), "normalized_shape: expected an int or a sequence"),
    "wrong size": (lambda x, w: (x, 5), "normalized_shape: expected the last sizes of x"),
    "first size": (lambda x, w: (x, (2,)), "normalized_shape: expected the last sizes of x"),
    "too many": (lambda x, w: (x, (1, 2, 3, 4)), "normalized_shape: expected the last sizes of x"),
    "weight shape": (lambda x, w: (x, 4, w[:3]), "weight: expected shape [4], normalized_shape"),
    "weight broadcast": (lambda x, w: (x, (3, 4), w), "weight: expected shape [3, 4]"),
    "bias shape": (lambda x, w: (x, 4, w, w[None]), "bias: expected shape [4]"),
    "weight dtype": (lambda x, w: (x, 4, w.float()), "weight: expected dtype torch.float64, got"),
    "half weight": (
        lambda x, w: (x.float(), 4, w.half()),
        "weight: expected dtype torch.float32, got",
    ),
    "other half": (
        lambda x, w: (x.half(), 4, w.bfloat16()),
        "weight: expected dtype torch.float16 or torch.float32, got torch.bfloat16",
    ),
    "bias dtype": (
        lambda x, w: (x.half(), 4, w.float(), w.half()),
        "bias: expected dtype torch.float32, got torch.float16",
    ),
    "weight no tensor": (lambda x, w: (x, 4, w.tolist()), "weight: expected a tensor, got list"),
    "bias no tensor": (lambda x, w: (x, 4, w, 1.0), "bias: expected a tensor, got float"),
    "integer weight": (lambda x, w: (x, 4, w.long()), "weight: expected a floating dtype"),
    "device": (lambda x, w: (x, 4, w.to("meta")), "weight: expected device cpu like x, got meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    change, message = BAD[name]
    x, w, _ = operands(CASES["tokens"])
    with pytest.raises(UsageError) as failure:
        dvf.layer_norm(*change(x, w))
    assert str(failure.value).startswith(message), failure.value
    assert "\n" not in str(failure.value)
    assert "; " in str(failure.value)
