"""The Triton routed penalty equals its definition, to second order, and makes u only tile by tile."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import diversevit_fast as dvf
from diversevit_fast.ops import reference
from diversevit_kernels.common.contracts import (
    HeadPenaltyBackward,
    RoutedHeadPenaltyBackward,
    RoutedHeadPenaltyDoubleBackward,
)
from tests.helpers.second_order import TAILS, WAYS
from tests.kernels.triton.conftest import INTERPRETED
from tests.kernels.triton.test_head_penalty import DTYPES, On, _NoGuards, compare
from tests.ops import test_routed_head_penalty as definition
from tests.ops.test_routed_head_penalty import KINDS, LAYOUTS, Case, operands
from tools.interpreter.sanitizer import sanitizer

kernels = pytest.importorskip("diversevit_kernels.triton.head_penalty.routed")
routing = pytest.importorskip("diversevit_kernels.triton.head_penalty.routed_products")
launching = pytest.importorskip("diversevit_kernels.triton.runtime.launch")
tensors = pytest.importorskip("diversevit_kernels.triton.runtime.tensors")

CASES = {
    "plain": Case(d=5, D=20),
    "one-head": Case(H=1, N=2),
    "four-heads": Case(B=1, H=4, N=5, d=6, D=16),
    "twelve-heads": Case(B=1, H=12, N=2, d=1, D=5),
    "seventeen-heads": Case(B=1, H=17, N=2, d=2, D=3),
    "wider-than-model": Case(B=1, H=2, N=2, d=7, D=2),
    "heads-first": Case(d=5, D=9, layout="heads-first"),
    "no-dense-axis": Case(d=5, D=17, layout="slice"),
    "clamped": Case(N=2, eps=2.5),
    "class-token": Case(zero="patches", eps=0.1),
}
SOME_KINDS = [KINDS[0], KINDS[3]]


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture
def operator(device, guarded):
    return On(kernels, device, guarded)


def tokens_per_tile(patch, case, tokens, dtype=torch.float32):
    """Room for so many tokens in the one scratch of a forward, a quarter in those of a double backward."""
    size = torch.promote_types(dtype, torch.float32).itemsize
    patch.setattr(kernels, "SCRATCH_BYTES", tokens * case.H * case.D * size)


def check_results(operator, case, dtype, kind, seed=0, present=(True, True)):
    """All results of forward, backward and double backward within the error budget, float64 ones in float64."""
    inputs = operands(case, dtype, seed)
    wide = [x.double() for x in inputs]
    exact = definition.all_orders(reference, case, wide, kind, present)
    eager = definition.all_orders(reference, case, inputs, kind, present)
    ours = definition.all_orders(operator, case, inputs, kind, present)
    assert all(x.is_contiguous() for x in ours)
    lengths = SimpleNamespace(H=case.H, N=case.B * case.N, E=case.D + 3 * case.d, B=case.B)
    compare(ours, eager, exact, definition.scales(case, wide, kind, present), lengths)


@pytest.mark.parametrize("kind", SOME_KINDS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_within_budget(operator, case, dtype, kind):
    check_results(operator, case, dtype, kind)


@pytest.mark.parametrize("tokens", [1, 4, 9, 12, 17])
def test_tiles_of_tokens(operator, tokens, kind, monkeypatch):
    """One token, parts of a sample, whole samples, ragged last ones: the same numbers."""
    case = Case(B=3, H=3, N=4, d=2, D=5)
    tokens_per_tile(monkeypatch, case, tokens)
    check_results(operator, case, torch.float32, kind)


@pytest.mark.parametrize("present", [(True, False), (False, True)], ids=["dr", "dW"])
def test_results_without_a_cotangent(operator, present, kind, monkeypatch):
    tokens_per_tile(monkeypatch, CASES["plain"], 8)
    check_results(operator, CASES["plain"], torch.float32, kind, present=present)


OF_GRADIENTS = {
    "tokens-first": lambda r: r.transpose(0, 1).contiguous().transpose(0, 1),
    "pieces-first": lambda r: r.movedim(2, 0).contiguous().movedim(0, 2),
    "behind-class-token": lambda r: torch.cat([r[:, :1], r], 1)[:, 1:],
    "reversed-axes": lambda r: r.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
}
OF_WEIGHTS = {
    "transposed": lambda w: w.mT.contiguous().mT,
    "heads-first": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed-axes": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize(
    ("which", "layout"), [(0, name) for name in OF_GRADIENTS] + [(1, name) for name in OF_WEIGHTS]
)
@pytest.mark.parametrize("kind", SOME_KINDS, ids="-".join)
def test_a_layout_changes_no_bit(which, layout, kind, operator, monkeypatch):
    """Of each operand by itself: strides of its own along every axis."""
    case = Case(B=3, H=2, N=4, d=3, D=5)
    tokens_per_tile(monkeypatch, case, 32)
    dense, moved = operands(case, torch.float32), operands(case, torch.float32)
    moved[which] = (OF_GRADIENTS, OF_WEIGHTS)[which][layout](moved[which])
    results = (definition.all_orders(operator, case, inputs, kind) for inputs in (dense, moved))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("absent", ["dpenalty", "dcosines"])
def test_an_absent_cotangent_counts_as_zero(absent, kind, device):
    case, values = Case(d=3, D=5), (*kind, 1e-12)
    r, w = (x.to(device) for x in operands(case))
    _, cosines, norms = reference.routed_head_penalty_forward(r, w, *values)
    dp, dc, *dd = (x.to(device) for x in definition.cotangents(r.cpu(), w.cpu(), cosines.cpu()))
    given = (r, w, cosines, norms, None if absent == "dpenalty" else dp)
    given += (None if absent == "dcosines" else dc,)
    first = kernels.routed_head_penalty_backward(RoutedHeadPenaltyBackward(*given, *values))
    torch.testing.assert_close(
        first, reference.routed_head_penalty_backward(RoutedHeadPenaltyBackward(*given, *values))
    )
    second = kernels.routed_head_penalty_double_backward(
        RoutedHeadPenaltyDoubleBackward(*given, *dd, *values)
    )
    expect = reference.routed_head_penalty_double_backward(
        RoutedHeadPenaltyDoubleBackward(*given, *dd, *values)
    )
    assert [x is None for x in second] == [x is None for x in expect]
    for ours, exact in zip(second, expect, strict=True):
        torch.testing.assert_close(ours, exact)


@st.composite
def any_case(draw):
    return Case(
        B=draw(st.integers(1, 2)),
        H=draw(st.sampled_from([1, 3, 4, 12, 17, 33])),
        N=draw(st.sampled_from([1, 2, 5])),
        d=draw(st.sampled_from([1, 3, 8])),
        D=draw(st.sampled_from([1, 4, 33])),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        zero=draw(st.sampled_from(["none", "patches"])),
        eps=draw(st.sampled_from([0.1, 1.0])),
    )


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    any_case(),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
    st.sampled_from([5, 1000]),
)
def test_any_shape_within_budget(operator, case, dtype, kind, seed, tokens):
    with pytest.MonkeyPatch.context() as patch:
        tokens_per_tile(patch, case, tokens, dtype)
        check_results(operator, case, dtype, kind, seed)


@pytest.mark.parametrize("kind", SOME_KINDS, ids="-".join)
def test_derivatives_entry_by_entry(kind, device):
    """The full Jacobians, with a cotangent of the penalty and of the cosines."""
    case = Case(B=1, H=2, N=2, d=1, D=2)
    inputs = [x.to(device).requires_grad_() for x in operands(case)]
    with dvf.use_backend("triton"):
        assert gradcheck(definition.as_function(case, kind), inputs)
        assert gradgradcheck(definition.as_function(case, kind), inputs)


@pytest.mark.parametrize("results", ["penalty", "both"])
def test_first_and_second_derivative(results, kind, device):
    case = Case(B=1, H=3, N=3, d=2, D=3)
    inputs = [x.to(device).requires_grad_() for x in operands(case)]
    f = definition.as_function(case, kind, results)
    with dvf.use_backend("triton"):
        assert gradcheck(f, inputs, fast_mode=True)
        assert gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("frozen", ["grad_qkv", "weight_qkv"])
def test_an_operand_may_be_a_constant(frozen, kind, device):
    inputs = [x.to(device).requires_grad_() for x in operands(CASES["one-head"]._replace(H=2))]
    inputs[frozen == "weight_qkv"].requires_grad_(False)
    with dvf.use_backend("triton"):
        assert gradgradcheck(definition.as_function(Case(), kind), inputs, fast_mode=True)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_twice(way, tail, device):
    case, kind = Case(N=2, d=2, D=3), KINDS[1]
    inputs = [x.to(device) for x in operands(case)]
    with dvf.use_backend("triton"):
        ours = WAYS[way](definition.as_function(case, kind), inputs, TAILS[tail])
    exact = WAYS["autograd.grad"](definition.defined(case, kind), inputs, TAILS[tail])
    torch.testing.assert_close(list(ours), list(exact), rtol=1e-9, atol=1e-9)


def test_autocast_lets_the_dtypes_differ(kind, device):
    """bfloat16 gradients of a float32 weight: each result has its operand's dtype."""
    case, values = CASES["plain"], (*kind, 1e-12)
    r, w = (x.to(device) for x in operands(case, torch.float32))
    r = r.bfloat16()
    _, cosines, norms = kernels.routed_head_penalty_forward(r, w, *values)
    _, exact, lengths = reference.routed_head_penalty_forward(r.double(), w.double(), *values)
    torch.testing.assert_close(cosines.double(), exact, rtol=1e-5, atol=1e-5)
    given = cosines, norms, torch.ones_like(norms[(0,) * norms.ndim]), None
    dr, dw = kernels.routed_head_penalty_backward(RoutedHeadPenaltyBackward(r, w, *given, *values))
    assert (dr.dtype, dw.dtype) == (torch.bfloat16, torch.float32)
    wide = exact, lengths, given[2].double(), None
    _, exact_dw = reference.routed_head_penalty_backward(
        RoutedHeadPenaltyBackward(r.double(), w.double(), *wide, *values)
    )
    torch.testing.assert_close(dw.double(), exact_dw, rtol=1e-4, atol=1e-6)


SCRATCH = {
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


@pytest.mark.parametrize("dtype", SCRATCH, ids=str)
def test_what_returns_is_kept_in_bfloat16_if_all_is(dtype, device):
    """u never is, for cosines are float32's; nor du in float16, whose range 1 / n leaves."""
    r, w = (x.to(device) for x in operands(CASES["plain"], dtype))
    kind = "token", "all", 1e-12
    for (one, two), returned in (((r, w), SCRATCH[dtype]), ((r, w.double()), torch.float64)):
        router = kernels._Router(one, two, *kind, made=2, returned=2)
        t = next(router.blocks())[0]
        made = torch.promote_types(two.dtype, torch.float32)
        assert [router.scratch(i, t).dtype for i in range(4)] == [made, made, returned, returned]


@pytest.mark.parametrize("kind", SOME_KINDS, ids="-".join)
def test_tiny_gradients_in_float16(kind, device):
    """du is beyond float16's largest number, dW, the sum of its products with those gradients, is not."""
    r, w = operands(CASES["plain"])
    r, w = (1e-7 * r).half(), (1e-2 * w).half()
    values = (*kind, 1e-20)

    def weight_gradient(operator, *inputs):
        _, cosines, norms = operator.routed_head_penalty_forward(*inputs, *values)
        given = *inputs, cosines, norms, torch.ones_like(norms[(0,) * norms.ndim]), None
        first = RoutedHeadPenaltyBackward(*given, *values)
        assert routed_gradient(*first).abs().max() > torch.finfo(torch.float16).max
        return operator.routed_head_penalty_backward(first)[1].double().cpu()

    def routed_gradient(r, w, *rest):
        of = HeadPenaltyBackward(reference.route(r.cpu(), w.cpu()), *(_on_cpu(x) for x in rest))
        return reference.head_penalty_backward(of)

    exact = weight_gradient(reference, r.double(), w.double())
    ours = weight_gradient(kernels, r.to(device), w.to(device))
    assert (ours - exact).abs().max() <= 1e-3 * exact.abs().max()


def _on_cpu(x):
    return x.cpu() if isinstance(x, torch.Tensor) else x


def test_relabelling_heads_permutes_the_cosines(kind, device):
    r, w = (x.to(device) for x in operands(Case(H=5, d=3, D=7)))
    order, f = torch.tensor([3, 0, 4, 2, 1], device=device), (*kind, 1e-12)
    penalty, cosines, _ = kernels.routed_head_penalty_forward(r, w, *f)
    permuted, others, _ = kernels.routed_head_penalty_forward(r[..., order, :], w[:, order], *f)
    torch.testing.assert_close(others, cosines[..., order, :][..., order])
    torch.testing.assert_close(permuted, penalty)


def test_orthogonal_heads_have_no_penalty(kind, device):
    """Heads that read channels of their own."""
    r, w = (x.to(device) for x in operands(Case(H=3, d=2, D=6)))
    w = w * torch.eye(3, device=device, dtype=w.dtype).repeat_interleave(2, 1)[None, :, None]
    assert kernels.routed_head_penalty_forward(r, w, *kind, 1e-12)[0] == 0


def test_runs_give_the_same_bits(kind, device, monkeypatch):
    case = Case(B=3, H=3, N=5, d=5, D=9)
    tokens_per_tile(monkeypatch, case, 8)
    operator = On(kernels, device, _NoGuards())
    results = (
        definition.all_orders(operator, case, operands(case, torch.float32), kind) for _ in range(2)
    )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("scratch", [4 * 4 * 64 * 40, None], ids=["small", "as shipped"])
def test_the_routed_gradients_never_exist(scratch, kind, device, monkeypatch):
    """No function allocates more than the scratch allows; with one that holds all, we would see it."""
    case = Case(B=4, H=4, N=50, d=2, D=64)
    if scratch is not None:
        monkeypatch.setattr(kernels, "SCRATCH_BYTES", scratch)
    sizes = []

    def watching(shape, *, dtype, device):
        made = torch.zeros(shape, dtype=dtype, device=device)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(tensors, "allocator", watching)
    inputs = operands(case, torch.float32)
    operator = kernels if device.type == "cpu" else On(kernels, device, _NoGuards())
    with launching.recording(run=False):
        definition.all_orders(operator, case, inputs, kind)
    routed = 4 * case.B * case.H * case.N * case.D
    assert (max(sizes) < routed / 4) == (scratch is not None)


@pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_access_out_of_bounds(layout, kind, monkeypatch):
    """Not even a load whose value is thrown away, nor one from a gap of a strided view."""
    case = Case(B=2, H=3, N=3, d=3, D=19, layout=layout)
    tokens_per_tile(monkeypatch, case, 16)
    with sanitizer():
        definition.all_orders(kernels, case, operands(case, torch.float32), kind)


def test_too_many_heads_are_refused_in_one_line(device):
    r, w = torch.zeros(1, 1, 3, 65, 1, device=device), torch.zeros(3, 65, 1, 2, device=device)
    with pytest.raises(NotImplementedError, match="up to 64 heads, not 65") as refusal:
        kernels.routed_head_penalty_forward(r, w, "token", "all", 1e-12)
    assert "\n" not in str(refusal.value)
    with pytest.raises(NotImplementedError, match="float8"):
        kernels.routed_head_penalty_forward(r.to(torch.float8_e5m2), w, "token", "all", 1e-12)


class Sabotaged(On):
    """The kernels with one named mistake."""

    def __init__(self, operator, mistake):
        super().__init__(operator.operator, operator.device, operator.guards)
        self.mistake = mistake

    def routed_head_penalty_forward(self, r, w, *kind):
        if self.mistake == "values dropped":
            r = r.clone()
            r[:, :, 2] = 0
        return On.__getattr__(self, "routed_head_penalty_forward")(r, w, *kind)

    def routed_head_penalty_backward(self, inputs):
        dr, dw = On.__getattr__(self, "routed_head_penalty_backward")(inputs)
        if self.mistake == "unwritten token":
            dr[-1, -1] = torch.nan
        if self.mistake == "last token missing from dW":
            short = inputs.grad_qkv.clone()
            short[:, -1] = 0
            inputs = inputs._replace(grad_qkv=short)
            _, dw = On.__getattr__(self, "routed_head_penalty_backward")(inputs)
        return dr, dw

    def routed_head_penalty_double_backward(self, inputs):
        if self.mistake == "ddgrad_qkv ignored":
            inputs = inputs._replace(ddgrad_qkv=None)
        if self.mistake == "ddweight ignored":
            inputs = inputs._replace(ddweight=None)
        return On.__getattr__(self, "routed_head_penalty_double_backward")(inputs)


MISTAKES = ["values dropped", "unwritten token", "last token missing from dW"]
MISTAKES += ["ddgrad_qkv ignored", "ddweight ignored"]


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", SOME_KINDS, ids="-".join)
def test_the_oracle_bites(mistake, kind, operator):
    case = Case(B=2, H=3, N=3, d=4, D=8)
    check_results(Sabotaged(operator, "none"), case, torch.bfloat16, kind)
    with pytest.raises(AssertionError, match=r"exceeds budget|non-finite"):
        check_results(Sabotaged(operator, mistake), case, torch.bfloat16, kind)


@pytest.mark.parametrize("name", ["route", "route_back", "weight"])
@pytest.mark.parametrize("kind", SOME_KINDS, ids="-".join)
def test_the_oracle_sees_a_program_dropped(name, kind, operator, monkeypatch):
    """Of each kernel the last one: what it should have written is NaN."""

    def short(plan, kernel, grid, *args, **constants):
        fewer = (lambda c: grid(c) - 1) if plan.table.name == f"routed_penalty_{name}" else grid
        launching.run_kernel(plan, kernel, fewer, *args, **constants)

    monkeypatch.setattr(routing, "run_kernel", short)
    with pytest.raises(AssertionError, match="non-finite"):
        check_results(operator, Case(d=5, D=20), torch.float32, kind)
