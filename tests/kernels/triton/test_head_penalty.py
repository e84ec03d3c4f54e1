"""The Triton head penalty equals its definition, to second order, and writes where it should."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError
from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import HeadPenaltyBackward, HeadPenaltyDoubleBackward
from tests.helpers.second_order import TAILS, WAYS
from tests.kernels.triton.conftest import INTERPRETED
from tests.ops import test_head_penalty as definition
from tests.ops.test_head_penalty import KINDS, LAYOUTS, Case, gradients
from tools.interpreter.sanitizer import sanitizer

kernels = pytest.importorskip("diversevit_kernels.triton.head_penalty.plain")
products = pytest.importorskip("diversevit_kernels.triton.head_penalty.gram")
cosine = pytest.importorskip("diversevit_kernels.triton.head_penalty.cosine")
sums = pytest.importorskip("diversevit_kernels.triton.runtime.sums")
launching = pytest.importorskip("diversevit_kernels.triton.runtime.launch")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CASES = {
    "plain": Case(B=2, H=3, N=3, E=20),
    "one-head": Case(H=1, N=2, E=5),
    "four-heads": Case(B=1, H=4, N=5, E=16, layout="BHNE"),
    "twelve-heads": Case(B=1, H=12, N=2, E=33, layout="BHEN"),
    "sixteen-heads": Case(B=1, H=16, N=2, E=7),
    "seventeen-heads": Case(B=1, H=17, N=2, E=33, layout="slice"),
    "thirty-three-heads": Case(B=1, H=33, N=1, E=17),
    "one-channel": Case(E=1, N=2, layout="BHNE"),
    "expanded": Case(N=5, E=9, layout="expanded"),
    "several-parts": Case(B=2, H=4, N=9, E=15, layout="slice"),
    "clamped": Case(E=3, eps=1.5),
    "zero-head": Case(E=6, zero="head", eps=0.1),
    "class-token": Case(E=6, zero="patches", eps=0.1),
    "all-zero": Case(zero="all", eps=0.1),
}


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


class On:
    """An operator's functions on a device: inputs between guard zones and not written to, results brought back."""

    def __init__(self, operator, device, guards):
        self.operator, self.device, self.guards = operator, device, guards

    def __getattr__(self, name):
        def call(*args):
            inputs = args if len(args) > 1 else args[0]  # of a backward, one named tuple
            there = [self.guards.place(x, self.device) if _is_tensor(x) else x for x in inputs]
            before = [x.clone() for x in there if _is_tensor(x)]
            given = there if len(args) > 1 else [type(inputs)(*there)]
            results = getattr(self.operator, name)(*given)
            after = [x for x in there if _is_tensor(x)]
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
            if _is_tensor(results):
                return results.cpu()
            return tuple(None if x is None else x.cpu() for x in results)

        return call


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


@pytest.fixture
def operator(device, guarded):
    return On(kernels, device, guarded)


def check_results(operator, case, dtype, kind, seed=0):
    """All results of forward, backward and double backward within the error budget, float64 ones in float64."""
    grads = gradients(case, dtype, seed)
    exact = definition.all_orders(reference, case, grads.double(), kind)
    eager = definition.all_orders(reference, case, grads, kind)
    ours = definition.all_orders(operator, case, grads, kind)
    for i in (3, 4):
        assert ours[i].transpose(1, 2).is_contiguous(), "not laid out as [B, N, H, E]"
    compare(ours, eager, exact, definition.scales(case, grads.double(), kind), case)


def compare(ours, eager, exact, scales, case):
    """``assert_within_budget`` of each result, rounding sums of magnitude ``scales`` in float32 at least.

    A half result is rounded once, after its sums, or twice where bfloat16 gradients return through a projection: one
    unit, not half of one.
    """
    terms = case.H * case.N * case.E + case.B * case.H**2
    for one, plain, truth, scale in zip(ours, eager, exact, scales, strict=True):
        assert one.dtype == plain.dtype
        assert one.shape == truth.shape
        half = torch.finfo(one.dtype).bits == 16
        share = torch.finfo(torch.float32).eps / torch.finfo(one.dtype).eps if half else 1
        unit = (scale * (terms**0.5 * share if half else 1)).to(one.dtype).view(1)
        assert_within_budget(
            torch.cat([one.flatten(), unit]),
            torch.cat([plain.flatten(), unit]),
            torch.cat([truth.flatten(), unit.double()]),
            terms=1 if half else terms,
        )


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_within_budget(operator, case, dtype, kind):
    check_results(operator, case, dtype, kind)


@st.composite
def any_case(draw):
    return Case(
        B=draw(st.integers(1, 2)),
        H=draw(st.sampled_from([1, 3, 4, 12, 17, 33])),
        N=draw(st.sampled_from([1, 2, 5])),
        E=draw(st.sampled_from([1, 3, 16, 37])),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        zero=draw(st.sampled_from(["none", "patches"])),
        eps=draw(st.sampled_from([0.1, 1.0])),
    )


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(any_case(), st.sampled_from(DTYPES), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_any_shape_within_budget(operator, case, dtype, kind, seed):
    check_results(operator, case, dtype, kind, seed)


@pytest.mark.parametrize("absent", ["dpenalty", "dcosines"])
def test_an_absent_cotangent_counts_as_zero(absent, kind, device):
    case = Case(H=4, N=3, E=20)
    values = tuple(definition.options(case, kind).values())
    grads = gradients(case).to(device)
    _, cosines, norms = reference.head_penalty_forward(grads, *values)
    dp, dc, a = (x.to(device) for x in definition.cotangents(grads.cpu(), cosines.cpu()))
    given = (grads, cosines, norms, None if absent == "dpenalty" else dp)
    given += (None if absent == "dcosines" else dc,)
    first = kernels.head_penalty_backward(HeadPenaltyBackward(*given, *values))
    torch.testing.assert_close(
        first, reference.head_penalty_backward(HeadPenaltyBackward(*given, *values))
    )
    second = kernels.head_penalty_double_backward(HeadPenaltyDoubleBackward(*given, a, *values))
    expect = reference.head_penalty_double_backward(HeadPenaltyDoubleBackward(*given, a, *values))
    assert [x is None for x in second] == [x is None for x in expect]
    for ours, exact in zip(second, expect, strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_cotangent_of_the_cosines_may_have_any_strides(kind, device):
    """As a sum's: one element, expanded."""
    case = Case(H=4, N=3, E=20)
    values, grads = tuple(definition.options(case, kind).values()), gradients(case).to(device)
    _, cosines, norms = reference.head_penalty_forward(grads, *values)
    given = (grads, cosines, norms, None, cosines.new_ones(()).expand(cosines.shape))
    ours = kernels.head_penalty_backward(HeadPenaltyBackward(*given, *values))
    torch.testing.assert_close(
        ours, reference.head_penalty_backward(HeadPenaltyBackward(*given, *values))
    )


@pytest.mark.parametrize(
    ("name", "results"),
    [("plain", "both"), ("plain", "penalty"), ("clamped", "cosines"), ("one-head", "both")],
)
def test_first_and_second_derivative(name, results, kind, device):
    case = CASES[name]._replace(B=1, N=2, E=3)
    leaf, f = definition.leaf_and_function(case, kind, results)
    leaf = leaf.detach().to(device).requires_grad_()
    with dvf.use_backend("triton"):
        assert gradcheck(f, leaf)
        assert gradgradcheck(f, leaf)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_twice(way, tail, device):
    kind, grads = KINDS[1], gradients(Case(H=3, N=2, E=5)).to(device)
    f = definition.as_function(Case(), kind, "both")
    with dvf.use_backend("triton"):
        ours = WAYS[way](f, [grads], TAILS[tail])
    exact = WAYS["autograd.grad"](definition.defined(f), [grads], TAILS[tail])
    torch.testing.assert_close(list(ours), list(exact), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero", ["head", "patches", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradients_cost_no_nan(zero, dtype, kind, device):
    """At the default eps: cosine 0 with every head, and no gradient of a penalty that is zero."""
    case = Case(H=3, N=3, E=5, zero=zero)
    grads = gradients(case, dtype).to(device).requires_grad_()
    with dvf.use_backend("triton"):
        penalty, cosines = dvf.head_penalty(
            grads, granularity=kind[0], reduction=kind[1], return_cosines=True
        )
        (first,) = torch.autograd.grad(penalty, grads)
    assert torch.isfinite(cosines).all()
    assert torch.isfinite(first).all()
    if zero == "all":
        assert not cosines.any()
        assert not first.any()


def test_not_a_number_stays_one(kind, device):
    """In its own group, and in no other sample's."""
    grads = gradients(Case(B=2, H=3, N=2, E=5), torch.float32).to(device)
    grads[0, 1, 0, 2] = torch.nan
    penalty, cosines, norms = kernels.head_penalty_forward(grads, *kind, 1e-12)
    assert penalty.isnan()
    assert cosines[0].isnan().any()
    assert norms[0].isnan().any()
    assert torch.isfinite(cosines[1]).all()


class TestLaws(definition.TestLaws):
    """What the penalty means."""

    @pytest.fixture(autouse=True)
    def _triton(self):
        with dvf.use_backend("triton"):
            yield

    @pytest.fixture
    def grads(self, device):
        return gradients(Case(H=5, N=4, E=19)).to(device)


def test_runs_give_the_same_bits(kind, device):
    case = Case(B=2, H=4, N=9, E=16)
    operator = On(kernels, device, _NoGuards())
    results = (
        definition.all_orders(operator, case, gradients(case, torch.float32), kind)
        for _ in range(2)
    )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


class _NoGuards:
    @staticmethod
    def place(x, device):
        return x.to(device)


@pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_access_out_of_bounds(layout, kind):
    """Not even a load whose value is thrown away, nor one from a gap of a strided view."""
    case = Case(B=2, H=3, N=3, E=19, layout=layout)
    with sanitizer():
        definition.all_orders(kernels, case, gradients(case, torch.float32), kind)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_copied(layout, kind, device):
    """Every launch reads the gradients where they lie, with their strides."""
    case = Case(B=2, H=3, N=3, E=5, layout=layout)
    grads = gradients(case, torch.float32).to(device)
    with launching.recording(run=False) as launches:
        definition.all_orders(kernels, case, grads.cpu() if INTERPRETED else grads, kind)
    read = [x for one in launches for x in one.args if hasattr(x, "sample")]
    assert any(x.ptr.data_ptr() == grads.data_ptr() for x in read)
    for x in read:
        if x.ptr.data_ptr() == grads.data_ptr():
            assert (x.sample, x.head, x.row, x.col) == grads.stride()


@pytest.mark.overflow
def test_offsets_beyond_two_to_the_31(kind, device):
    """Strides whose products overflow 32 bits, along each axis."""
    plain = gradients(Case(B=2, H=2, N=2, E=2, layout="BHNE"), torch.float16).to(device)
    room = torch.empty(2**31 + 2**11, dtype=torch.float16, device=device)  # touched where used
    values = (*kind, 1e-12)
    for axis in range(4):
        strides = [8, 4, 2, 1]
        strides[axis] = 2**31 + 7
        far = room.as_strided(plain.shape, strides).copy_(plain)
        for one, two in zip(
            kernels.head_penalty_forward(far, *values),
            kernels.head_penalty_forward(plain, *values),
            strict=True,
        ):
            assert torch.equal(one, two)


def test_what_no_kernel_takes_is_refused_in_one_line(device):
    x = torch.zeros(1, 65, 1, 2, device=device)
    with pytest.raises(NotImplementedError, match="up to 64 heads, not 65") as refusal:
        kernels.head_penalty_forward(x, "token", "all", 1e-12)
    assert "\n" not in str(refusal.value)
    x = torch.zeros(1, 2, 1, 2, device=device).to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="float8"):
        kernels.head_penalty_forward(x, "token", "all", 1e-12)
    wide = torch.zeros(1, 65, 1, 2, device=device)
    with dvf.use_backend("triton"), pytest.raises(UnsupportedError, match="65"):
        dvf.head_penalty(wide)


def test_sixty_four_heads_are_taken(operator):
    check_results(operator, Case(B=1, H=64, N=1, E=9), torch.float32, KINDS[0])


class Sabotaged(On):
    """The kernels with one named mistake."""

    def __init__(self, operator, mistake):
        super().__init__(operator.operator, operator.device, operator.guards)
        self.mistake = mistake

    def head_penalty_forward(self, grads, granularity, reduction, eps):
        if self.mistake == "pairs divided by H^2":
            reduction = "all"
        if self.mistake == "last token dropped":
            grads = grads.clone()
            grads[:, :, -1] = 0
        kind = granularity, reduction, eps
        penalty, cosines, norms = On.__getattr__(self, "head_penalty_forward")(grads, *kind)
        return penalty, cosines, norms + (self.mistake == "norms moved") * 1e-3

    def head_penalty_backward(self, inputs):
        if self.mistake == "clamped norms differentiated":
            inputs = inputs._replace(eps=1e-12)
        if self.mistake == "dcosines taken once":
            inputs = inputs._replace(dcosines=inputs.dcosines / 2)
        first = On.__getattr__(self, "head_penalty_backward")(inputs)
        if self.mistake == "unwritten token":
            first[-1, :, -1] = torch.nan
        return first

    def head_penalty_double_backward(self, inputs):
        if self.mistake == "A transposed":
            inputs = inputs._replace(ddgrads=inputs.ddgrads.flip(1))
        second = list(On.__getattr__(self, "head_penalty_double_backward")(inputs))
        if self.mistake == "M_dot dropped":
            along = HeadPenaltyBackward(inputs.ddgrads, *inputs[1:5], *inputs[6:])
            second[0] = On.__getattr__(self, "head_penalty_backward")(along)
        if self.mistake == "gdpenalty halved":
            second[1] = second[1] / 2
        return tuple(second)


MISTAKES = ["pairs divided by H^2", "last token dropped", "norms moved", "unwritten token"]
MISTAKES += ["clamped norms differentiated", "dcosines taken once", "A transposed"]
MISTAKES += ["M_dot dropped", "gdpenalty halved"]


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_the_oracle_bites(mistake, granularity, operator):
    kind = (granularity, "pairs")
    case = Case(B=2, H=4, N=5, E=8, eps=2.7 if granularity == "token" else 6.3)
    check_results(Sabotaged(operator, "none"), case, torch.bfloat16, kind)
    with pytest.raises(AssertionError, match=r"exceeds budget|non-finite"):
        check_results(Sabotaged(operator, mistake), case, torch.bfloat16, kind)


KERNELS = {
    "token": ["statistics", "backward", "double_backward"],
    "sample": ["products", "statistics", "backward", "curvature", "double_backward"],
}
KERNELS = {
    kind: [f"head_penalty_{n}" for n in some] + ["total_sum"] for kind, some in KERNELS.items()
}


@pytest.mark.parametrize(("granularity", "name"), [(g, n) for g in KERNELS for n in KERNELS[g]])
def test_the_oracle_sees_a_program_dropped(granularity, name, operator, monkeypatch):
    """Of each kernel the last one: what it should have written is NaN."""

    def short(plan, kernel, grid, *args, **constants):
        fewer = (lambda c: grid(c) - 1) if plan.table.name == name else grid
        launching.run_kernel(plan, kernel, fewer, *args, **constants)

    for module in (products, sums):
        monkeypatch.setattr(module, "run_kernel", short)
    with pytest.raises(AssertionError, match="non-finite"):
        check_results(operator, Case(B=2, H=3, N=5, E=9), torch.float32, (granularity, "all"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100])
def test_a_total_below_at_and_above_a_tile(n, dtype, device, guarded):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    total = sums.total_of(guarded.place(x.to(device, dtype)))
    assert total.shape == ()
    torch.testing.assert_close(
        total.cpu().double(), x.to(dtype).double().sum(), rtol=0, atol=n * 1e-7
    )
