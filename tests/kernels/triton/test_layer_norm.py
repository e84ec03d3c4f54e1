"""The Triton LayerNorm kernels equal the definition, to second order, and write where they should."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import diversevit_fast as dvf
from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import LayerNormBackward, LayerNormDoubleBackward
from tests.helpers import layouts
from tests.helpers.second_order import TAILS, WAYS
from tests.kernels.triton.conftest import INTERPRETED
from tools.interpreter.sanitizer import sanitizer

kernels = pytest.importorskip("diversevit_kernels.triton.layer_norm.kernels")
sums = pytest.importorskip("diversevit_kernels.triton.runtime.sums")
tiles = pytest.importorskip("diversevit_kernels.triton.layer_norm.tiles")
launching = pytest.importorskip("diversevit_kernels.triton.runtime.launch")


class Case(NamedTuple):
    """``parameters``: which of weight and bias; ``cotangents``: which of ddx, ddw, ddb are present;
    ``kinds``: the layout of each of x, dy, ddx (the last one for the rest); ``wide``: float32 parameters."""

    shape: tuple[int, ...] = (2, 5, 12)
    axes: int = 1
    parameters: str = "wb"
    kinds: tuple[str, ...] = ("dense",)
    cotangents: str = "xwb"
    eps: float = 1e-5
    wide: bool = False


LAYOUTS = {
    **layouts.LAYOUTS,
    "rows-reversed-axes": lambda x: (
        x.permute(*range(x.ndim - 2, -1, -1), x.ndim - 1)
        .contiguous()
        .permute(*range(x.ndim - 2, -1, -1), x.ndim - 1)
    ),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CASES = {
    "tokens": Case(),
    "one-row": Case(shape=(11,)),
    "power-of-two": Case(shape=(5, 16)),
    "one-row-per-tile": Case(shape=(7, 65)),
    "many-tiles": Case(shape=(3, 13, 24)),
    "two-axes": Case(shape=(2, 3, 4, 5), axes=2),
    "every-axis": Case(shape=(3, 5), axes=2),
    "weight-only": Case(parameters="w"),
    "bias-only": Case(parameters="b"),
    "no-parameters": Case(parameters=""),
    "wide-parameters": Case(wide=True),
    "wide-bias": Case(wide=True, parameters="b"),
    "features-first": Case(kinds=("features-first",)),
    "transposed": Case(kinds=("transposed",)),
    "no-dense-axis": Case(kinds=("no-dense-axis",)),
    "behind-class-token": Case(kinds=("behind-class-token",)),
    "expanded": Case(kinds=("expanded",), eps=0.1),
    "expanded-cotangents": Case(kinds=("dense", "expanded")),
    "three-row-axes": Case(shape=(2, 3, 2, 12), kinds=("rows-reversed-axes",)),
    "three-layouts": Case(shape=(2, 3, 2, 12), kinds=("transposed", "dense", "no-dense-axis")),
    "axes-that-do-not-merge": Case(shape=(2, 3, 4, 5), axes=2, kinds=("no-dense-axis",)),
    "large-eps": Case(eps=0.5),
}


class Operands(NamedTuple):
    """The inputs of forward, backward and double backward."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    dy: torch.Tensor
    ddx: torch.Tensor | None
    ddw: torch.Tensor | None
    ddb: torch.Tensor | None


def operands(case, dtype, seed=0, device="cpu"):
    """Tensors of a case in their layouts; None where it has none."""
    g = torch.Generator().manual_seed(seed)
    normalized = case.shape[len(case.shape) - case.axes :]
    half = dtype in (torch.float16, torch.bfloat16)
    parameter = torch.float32 if case.wide and half and "w" in case.parameters else dtype

    def make(name, shape):
        t = torch.randn(shape, generator=g, dtype=torch.float64)
        if name not in ("x", "dy", "ddx"):
            return t.to(device, parameter)
        kinds = case.kinds + case.kinds[-1:] * 2
        return LAYOUTS[kinds[("x", "dy", "ddx").index(name)]](t.to(device, dtype))

    shapes = [case.shape if name in ("x", "dy", "ddx") else normalized for name in Operands._fields]
    made = Operands(*map(make, Operands._fields, shapes))
    absent = {
        *([] if "w" in case.parameters else ["weight", "ddw"]),
        *([] if "b" in case.parameters else ["bias", "ddb"]),
        *(f"dd{c}" for c in "xwb" if c not in case.cotangents),
    }
    return made._replace(**dict.fromkeys(absent))


def results_of(operator, case, t):
    """The results of forward, backward and double backward, in order."""
    asked = t.weight is not None, t.bias is not None
    y, mean, rstd = operator.layer_norm_forward(t.x, t.weight, t.bias, case.axes, case.eps)
    first = operator.layer_norm_backward(
        LayerNormBackward(t.x, t.weight, mean, rstd, t.dy, case.axes, *asked)
    )
    second = operator.layer_norm_double_backward(
        LayerNormDoubleBackward(
            *(t.x, t.weight, mean, rstd, t.dy, t.ddx, t.ddw, t.ddb, case.axes, asked[0])
        )
    )
    statistics = torch.stack([mean, 1 / rstd])  # one scale for both: a mean alone may be 0
    return [y, statistics, *first, *second]


def longest_sum(case, dtype):
    """Over rows, of values that hold sums over features; a half result is rounded once, after it."""
    if dtype in (torch.float16, torch.bfloat16):
        return 1
    width = torch.Size(case.shape[len(case.shape) - case.axes :]).numel()
    terms = torch.Size(case.shape).numel() // width + width
    return terms if dtype == torch.float32 else 16 * terms  # the exact value rounds as often


def check_results(case, dtype, operator=kernels, seed=0, device="cpu", guards=None):
    """All results within the error budget, dense, of the definition's dtypes; inputs stay as they are."""
    given = operands(case, dtype, seed, device)
    exact = results_of(
        reference, case, Operands(*(None if t is None else t.double() for t in given))
    )
    plain = results_of(reference, case, given)
    before = (
        given
        if guards is None
        else Operands(*(None if t is None else guards.place(t) for t in given))
    )
    actual = results_of(operator, case, before)
    for ours, eager, truth in zip(actual, plain, exact, strict=True):
        assert (ours is None) == (eager is None) == (truth is None)
        if truth is not None:
            assert ours.dtype == eager.dtype
            assert ours.is_contiguous()
            assert_within_budget(ours, eager, truth, terms=longest_sum(case, ours.dtype))
    for one, two in zip(before, operands(case, dtype, seed, device), strict=True):
        assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_within_budget(name, dtype, device, guarded):
    check_results(CASES[name], dtype, device=device, guards=guarded)


@pytest.mark.parametrize("width", [7, 17, 64, 100, 384, 577, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_widths(width, dtype, device, guarded):
    check_results(Case(shape=(9, width)), dtype, device=device, guards=guarded)


def test_widest_tile(device, guarded):
    case = Case(shape=(2, tiles.MAX_WIDTH))
    check_results(case, torch.float32, device=device, guards=guarded)


@pytest.mark.parametrize("rows", [1, 3, 9, 65, 577])
def test_row_counts(rows, device, guarded):
    """Fewer rows than a tile, than programs, and many tiles for each program."""
    check_results(Case(shape=(rows, 12)), torch.float32, device=device, guards=guarded)


@st.composite
def any_case(draw):
    sizes = st.sampled_from([1, 2, 3, 5, 16, 33])
    shape = tuple(draw(st.lists(sizes, min_size=2, max_size=4)))
    assume(torch.Size(shape).numel() < 3000)
    axes = draw(st.integers(1, len(shape)))
    # 1 or 2 features normalize to 0 or nearly +-1, so that gradients are differences of equal numbers
    assume(torch.Size(shape[len(shape) - axes :]).numel() > 6)
    kinds = tuple(draw(st.sampled_from(sorted(LAYOUTS))) for _ in range(3))
    assume("expanded" not in kinds or axes < len(shape))  # equal features cancel altogether
    return Case(
        shape=shape,
        axes=axes,
        parameters=draw(st.sampled_from(["wb", "w", "b", ""])),
        kinds=kinds,
        cotangents=draw(st.sampled_from(["xwb", "x", "w", "xb"])),
        eps=draw(st.sampled_from([1e-2, 0.3])),
        wide=draw(st.booleans()),
    )


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(case=any_case(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_any_shape_within_budget(case, dtype, seed, device, guarded):
    check_results(case, dtype, seed=seed, device=device, guards=guarded)


@pytest.mark.parametrize("parameters", ["wb", ""], ids=["parameters", "none"])
@pytest.mark.parametrize("cotangents", ["x", "w", "b", "xw", "xb", "wb", ""])
def test_any_subset_of_cotangents(cotangents, parameters, device, guarded):
    case = Case(cotangents=cotangents, parameters=parameters)
    check_results(case, torch.float32, device=device, guards=guarded)


@pytest.mark.parametrize("asked", [(False, False), (True, False), (False, True)], ids=str)
def test_parameter_gradients_nobody_asked_for(asked, device):
    """They are None, nothing is launched for them, and the rest is what it was."""
    case, t = Case(), operands(Case(), torch.float32, device=device)
    _, mean, rstd = kernels.layer_norm_forward(t.x, t.weight, t.bias, 1, case.eps)
    whole = kernels.layer_norm_backward(
        LayerNormBackward(t.x, t.weight, mean, rstd, t.dy, 1, True, True)
    )
    with launching.recording(run=True) as launches:
        part = kernels.layer_norm_backward(
            LayerNormBackward(t.x, t.weight, mean, rstd, t.dy, 1, *asked)
        )
    assert [one.name for one in launches] == ["layer_norm_backward"] + ["partial_sums"] * any(asked)
    for wanted, one, two in zip((True, *asked), part, whole, strict=True):
        assert torch.equal(one, two) if wanted else one is None
    with launching.recording(run=True) as launches:
        second = kernels.layer_norm_double_backward(
            LayerNormDoubleBackward(
                *(t.x, t.weight, mean, rstd, t.dy, t.ddx, t.ddw, t.ddb, 1, False)
            )
        )
    assert second[1] is None
    assert len(launches) == 1


@pytest.mark.parametrize(
    "name", ["tokens", "two-axes", "weight-only", "bias-only", "no-parameters", "transposed"]
)
def test_first_and_second_derivative(name, device):
    case = CASES[name]._replace(shape=(2, 3, 2, 2) if CASES[name].axes == 2 else (2, 2, 5))
    t = operands(case._replace(kinds=("dense",)), torch.float64, device=device)
    inputs = [p.requires_grad_() for p in (t.x, t.weight, t.bias) if p is not None]

    def f(x, *parameters):
        given = iter(parameters)
        w, b = (next(given) if name in case.parameters else None for name in "wb")
        x = LAYOUTS[case.kinds[0]](x)
        return dvf.layer_norm(x, x.shape[x.ndim - case.axes :], w, b, case.eps)

    with dvf.use_backend("triton"):
        assert gradcheck(f, inputs)
        assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_twice(way, tail, device):
    t = operands(Case(shape=(3, 4)), torch.float64, device=device)
    inputs = (t.x, t.weight, t.bias)
    with dvf.use_backend("triton"):
        ours = WAYS[way](lambda x, w, b: dvf.layer_norm(x, 4, w, b), inputs, TAILS[tail])
    exact = WAYS["autograd.grad"](
        lambda x, w, b: reference.layer_norm(x, (4,), w, b), inputs, TAILS[tail]
    )
    torch.testing.assert_close(list(ours), list(exact), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_feature_has_no_gradient(dtype, device):
    """Its normalized value is 0 whatever x is."""
    t = operands(Case(shape=(5, 1)), dtype, device=device)
    y, _, _, dx, _, _, gx, gw, _ = map(
        torch.Tensor.float, (*kernels.layer_norm_forward(*t[:3], 1, 0.1), *_after(t, 0.1))
    )
    assert torch.equal(y, t.bias.float().expand(5, 1))
    assert max(z.abs().max() for z in (dx, gx, gw)) < 1e-5


def _after(t, eps):
    _, mean, rstd = kernels.layer_norm_forward(*t[:3], 1, eps)
    first = kernels.layer_norm_backward(
        LayerNormBackward(t.x, t.weight, mean, rstd, t.dy, 1, True, True)
    )
    return *first, *kernels.layer_norm_double_backward(
        LayerNormDoubleBackward(t.x, t.weight, mean, rstd, *t[3:], 1, True)
    )


@pytest.mark.parametrize("value", [0.1, 3e4])
@pytest.mark.parametrize("width", [3, 24, 65, 384])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_row_normalizes_to_zero(width, value, dtype, device):
    """Exactly, though the sum over the row is rounded: the bias is left, and rstd is that of eps."""
    t = operands(Case(shape=(4, width)), dtype, device=device)
    x = torch.full_like(t.x, value)
    y, mean, rstd = kernels.layer_norm_forward(x, t.weight, t.bias, 1, 1e-12)
    assert torch.equal(y, t.bias.expand(4, width))
    assert torch.equal(mean.to(dtype), x[:, 0])
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e6))
    for z in _after(t._replace(x=x), 1e-2):  # with the other, 1 / eps is beyond float16
        assert z.isfinite().all()


def test_a_large_mean_costs_no_accuracy(device):
    """x = 1000 + noise: the variance is not a difference of squares."""
    t = operands(Case(shape=(4, 100)), torch.float32, device=device)
    x = t.x + 1000
    y, _, rstd = kernels.layer_norm_forward(x, None, None, 1, 1e-5)
    exact, _, one = reference.layer_norm_forward(x.double(), None, None, 1, 1e-5)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-4)
    torch.testing.assert_close(rstd.double(), one, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tile", [8, 32, 256, 2048])
def test_any_tile_size_gives_the_same_results(tile, device, guarded, monkeypatch):
    """Autotuning launches kernels with tiles that the table did not choose for them."""

    def other(plan, *args, **constants):
        chosen = dataclasses.replace(plan.configuration, tiles=(("TILE", tile),))
        other_plan = dataclasses.replace(plan, configuration=chosen)
        launching.run_kernel(other_plan, *args, **constants)

    monkeypatch.setattr(kernels, "run_kernel", other)
    check_results(Case(shape=(29, 12)), torch.float32, device=device, guards=guarded)


@pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter")
@pytest.mark.parametrize("name", CASES)
def test_no_access_out_of_bounds(name, device):
    """Not even a load whose value is thrown away, nor one from a gap of a strided view."""
    t = operands(CASES[name], torch.float32, device=device)
    with sanitizer():
        results_of(kernels, CASES[name], t)


@pytest.mark.parametrize("name", ["many-tiles", "three-layouts", "two-axes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_give_the_same_bits(name, dtype, device):
    t = operands(CASES[name], dtype, device=device)
    for one, two in zip(*(results_of(kernels, CASES[name], t) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_no_layout_is_copied(kind, device):
    t = operands(Case(shape=(2, 3, 2, 12), kinds=(kind,)), torch.float32, device=device)
    with launching.recording(run=False) as launches:
        results_of(kernels, Case(), t)
    read = [(a.ptr.data_ptr(), a.ptr.stride()) for a in launches[-2].args[:3]]
    assert read == [(z.data_ptr(), z.stride()) for z in (t.x, t.dy, t.ddx)]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0,)], ids=str)
def test_nothing_to_normalize(shape, device):
    """Right shapes, zeros as parameter gradients, no launch but what writes constants."""
    t = operands(Case(shape=shape), torch.float32, device=device)
    with launching.recording(run=True) as launches:
        y, _, dx, dw, db, gx, gw, gdy = results_of(kernels, Case(), t)
    assert {one.name for one in launches if one.grid[0]} <= {"dense_copy"}
    assert y.shape == dx.shape == gx.shape == gdy.shape == shape
    for gradient in (dw, db, gw):
        assert torch.equal(gradient, torch.zeros(shape[-1:], device=device))


@pytest.mark.overflow
@pytest.mark.parametrize("far", ["rows", "features"])
def test_offsets_beyond_two_to_the_31(far, device):
    """Strides whose products overflow 32 bits."""
    plain = operands(Case(shape=(3, 12)), torch.float16, device=device)
    strides = (2**30 + 7, 1) if far == "rows" else (1, 2**28 + 7)
    for name in ("x", "dy", "ddx"):
        # touched where used, no more
        room = torch.empty(3 * 2**30 + 2**10, dtype=torch.float16, device=device)
        moved = room.as_strided((3, 12), strides).copy_(getattr(plain, name))
        ours = results_of(kernels, Case(), plain._replace(**{name: moved}))
        for one, two in zip(ours, results_of(kernels, Case(), plain), strict=True):
            if device.type == "cpu":
                assert torch.equal(one, two)
            else:  # a compiler sums rows of another layout in another order
                torch.testing.assert_close(one, two)


class Sabotaged:
    """The kernels with one named mistake."""

    def __init__(self, mistake):
        self.mistake = mistake

    def layer_norm_forward(self, x, w, b, axes, eps):
        y, mean, rstd = kernels.layer_norm_forward(x, w, b, axes, eps)
        if self.mistake == "eps forgotten":
            rstd = (rstd**-2 - eps) ** -0.5
        return y, mean, rstd

    def layer_norm_backward(self, inputs):
        x, _, mean, rstd, dy, *_ = inputs
        dx, dw, db = kernels.layer_norm_backward(inputs)
        if self.mistake == "unwritten row":
            dx[-1] = torch.nan
        if self.mistake == "last row left out of dw":
            dw = dw - (dy[-1] * (x[-1] - mean[-1]) * rstd[-1])
        if self.mistake == "db of dx":
            db = dx.sum(0)
        return dx, dw, db

    def layer_norm_double_backward(self, inputs):
        x, w, mean, rstd, dy, a, ddw, ddb, *_ = inputs
        xh, r = (x - mean[:, None]) * rstd[:, None], rstd[:, None]

        def mean_of(z):
            return z.mean(-1, keepdim=True)

        if self.mistake == "cotangent of dw dropped":
            ddw = None
        gx, gw, gdy = kernels.layer_norm_double_backward(inputs._replace(ddw=ddw))
        s = r * (a - mean_of(a) - xh * mean_of(a * xh))
        if self.mistake == "q":
            gx = gx + r * mean_of(w * dy * s) * xh
        if self.mistake == "a2":  # h without r a2 w dy
            z = r * mean_of(a * xh) * w * dy
            gx = gx + r * (z - mean_of(z) - xh * mean_of(xh * z))
        if self.mistake == "bias cotangent":
            gdy = gdy - ddb
        return gx, gw, gdy


MISTAKES = ["eps forgotten", "unwritten row", "last row left out of dw", "db of dx", "q", "a2"]
MISTAKES += ["cotangent of dw dropped", "bias cotangent"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_bites(mistake, device):
    case = Case(shape=(13, 24), eps=1e-2)
    check_results(case, torch.float32, operator=Sabotaged("none"), device=device)
    with pytest.raises(AssertionError):
        check_results(case, torch.float32, operator=Sabotaged(mistake), device=device)


@pytest.mark.parametrize(
    "name",
    ["layer_norm_forward", "layer_norm_backward", "partial_sums", "layer_norm_double_backward"],
)
def test_the_oracle_sees_a_last_tile_dropped(name, device, monkeypatch):
    """One program too few of each kernel."""

    def short(plan, kernel, grid, *args, **constants):
        fewer = (lambda c: grid(c) - 1) if plan.table.name == name else grid
        launching.run_kernel(plan, kernel, fewer, *args, **constants)

    for module in (kernels, sums):
        monkeypatch.setattr(module, "run_kernel", short)
    with pytest.raises(AssertionError, match="non-finite"):
        check_results(Case(shape=(13, 24)), torch.float32, device=device)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 4).to(torch.float8_e4m3fn), "float8"),
        (torch.zeros(2, 8193), "up to 8192 features, not 8193"),
    ],
    ids=["dtype", "width"],
)
def test_what_no_kernel_takes_is_refused_in_one_line(x, says, device):
    with pytest.raises(NotImplementedError, match=says) as refusal:
        kernels.layer_norm_forward(x.to(device), None, None, 1, 1e-5)
    assert "\n" not in str(refusal.value)
