"""The routed penalty equals the penalty of gradients made explicitly, and the published loop's."""

import importlib
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import (
    RoutedHeadPenaltyBackward,
    RoutedHeadPenaltyDoubleBackward,
)
from diversevit_kernels.cpu.head_penalty import cosine, routed_blocked
from diversevit_kernels.cpu.head_penalty import routed_dispatch as cpu
from diversevit_kernels.cpu.head_penalty import routed_native as routed_head_penalty_native
from tests.helpers.second_order import TAILS, WAYS

ops = importlib.import_module("diversevit_fast.ops.routed_head_penalty")


class Case(NamedTuple):
    """Sizes; ``layout`` of both operands; ``zero``: tokens whose gradients vanish; ``eps``."""

    B: int = 2
    H: int = 3
    N: int = 3
    d: int = 2
    D: int = 3
    layout: str = "dense"
    zero: str = "none"
    eps: float = 1e-12


CASES = {
    "plain": Case(N=2),
    "one-head": Case(H=1, N=2),
    "four-heads": Case(B=1, H=4, N=2, d=1),
    "twelve-heads": Case(B=1, H=12, N=1, d=1, D=2),
    "seventeen-heads": Case(B=1, H=17, N=1, d=1, D=2),
    "wider-than-model": Case(B=1, H=2, d=3, D=2),
    "heads-first": Case(layout="heads-first"),
    "no-dense-axis": Case(N=2, layout="slice"),
    "clamped": Case(N=2, eps=2.5),
    "class-token": Case(zero="patches", eps=0.1),
}

LAYOUTS = {
    "dense": lambda x: x.contiguous(),
    "heads-first": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),
    "slice": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, 1)[:, ::2, ..., ::2],
}

KINDS = [(g, r) for g in ("token", "sample") for r in ("all", "pairs")]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def operands(case, dtype=torch.float64, seed=0):
    """``grad_qkv`` [B, N, 3, H, d] and ``weight_qkv`` [3, H, d, D]."""
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(case.B, case.N, 3, case.H, case.d, generator=g, dtype=torch.float64)
    w = torch.randn(3, case.H, case.d, case.D, generator=g, dtype=torch.float64)
    if case.zero == "patches":
        r[:, 1:] = 0
    return [LAYOUTS[case.layout](x.to(dtype)) for x in (r, w)]


def options(case, kind):
    granularity, reduction = kind
    return granularity, "all" if case.H == 1 else reduction, case.eps


def as_function(case, kind, results="both", penalise=None):
    """The penalty, or also the cosines in one tensor, of both operands in the case's layout."""
    granularity, reduction, eps = options(case, kind)

    def f(r, w):
        r, w = LAYOUTS[case.layout](r), LAYOUTS[case.layout](w)
        given = {"granularity": granularity, "reduction": reduction, "eps": eps}
        if penalise is None:
            given["return_cosines"] = True
        penalty, cosines = (penalise or dvf.routed_head_penalty)(r, w, **given)
        return penalty if results == "penalty" else torch.cat([penalty[None], cosines.flatten()])

    return f


def defined(case, kind, results="both"):
    return as_function(case, kind, results, reference.routed_head_penalty)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture
def tiles_only(monkeypatch):
    """Nothing of the routed penalty runs in C++."""
    monkeypatch.setattr(routed_head_penalty_native, "supports", lambda r, w: False)


@pytest.fixture(params=["native", "one-tile", "small-tiles"])
def tile(request, monkeypatch):
    """C++ where it is compiled; tiles of the size users get, and of a token or two."""
    if request.param != "native":
        request.getfixturevalue("tiles_only")
    if request.param == "small-tiles":
        monkeypatch.setattr(cosine, "TILE_ELEMENTS", 40)


@contextmanager
def poisoned():
    """Uninitialised memory holds NaN, so what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_first_and_second_derivative(case, kind, tile):
    inputs = [x.contiguous().requires_grad_() for x in operands(case)]
    f = as_function(case, kind)
    torch.testing.assert_close(f(*inputs), defined(case, kind)(*inputs), rtol=1e-11, atol=1e-12)
    assert gradcheck(f, inputs, fast_mode=True)
    assert gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["four-heads", "clamped", "class-token"])
@pytest.mark.parametrize("results", ["penalty", "both"])
def test_derivatives_entry_by_entry(name, results, kind):
    """The full Jacobians, in float64."""
    case = CASES[name]._replace(B=1, N=2, D=2)
    inputs = [x.requires_grad_() for x in operands(case)]
    assert gradcheck(as_function(case, kind, results), inputs)
    assert gradgradcheck(as_function(case, kind, results), inputs)


@pytest.mark.parametrize("frozen", ["grad_qkv", "weight_qkv"])
def test_an_operand_may_be_a_constant(frozen, kind):
    """One of the two cotangents of the backward's results is then absent."""
    inputs = [x.requires_grad_() for x in operands(CASES["plain"])]
    inputs[frozen == "weight_qkv"].requires_grad_(False)
    assert gradgradcheck(as_function(CASES["plain"], kind), inputs, fast_mode=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("results", "kind"), [("penalty", KINDS[0]), ("both", KINDS[3])], ids=str)
def test_every_way_of_asking_twice(results, kind, way, tail):
    case = CASES["plain"]
    expect = WAYS["autograd.grad"](defined(case, kind, results), operands(case), TAILS[tail])
    actual = WAYS[way](as_function(case, kind, results), operands(case), TAILS[tail])
    torch.testing.assert_close(list(actual), list(expect), rtol=1e-9, atol=1e-10)


def cotangents(r, w, cosines, seed=1):
    """Cotangents of the penalty, the cosines and both results of the backward."""
    g = torch.Generator().manual_seed(seed)
    likes = cosines.new_empty(()), cosines, r, w
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in likes]


def all_orders(kernels, case, inputs, kind, present=(True, True)):
    """All results of the three orders, in order; ``present``: which cotangents of the backward are."""
    kind = options(case, kind)
    penalty, cosines, norms = kernels.routed_head_penalty_forward(*inputs, *kind)
    dp, dc, *dd = cotangents(*inputs, cosines)
    given = (*inputs, cosines, norms, dp, dc)
    first = kernels.routed_head_penalty_backward(RoutedHeadPenaltyBackward(*given, *kind))
    dd = [x if there else None for x, there in zip(dd, present, strict=True)]
    second = kernels.routed_head_penalty_double_backward(
        RoutedHeadPenaltyDoubleBackward(*given, *dd, *kind)
    )
    return [penalty, cosines, norms, *first, *second]


def scales(case, inputs, kind, present):
    """Of each result of ``all_orders``, the largest sum of absolute terms: what is rounded if they cancel.

    |u_h| is at most the norm of the absolute products; derivatives as in ``test_head_penalty``.
    """
    r, w = (x.abs() for x in inputs)
    granularity, reduction, _ = options(case, kind)
    penalty, c, n = reference.routed_head_penalty_forward(*inputs, *options(case, kind))
    dp, dc, ar, aw = (x.abs() for x in cotangents(*inputs, c))
    ar, aw = ar * present[0], aw * present[1]
    pairs = reference.pair_weights(reference.route(r, w), granularity, reduction)

    def norm(u):
        return reference.by_group(u, granularity).norm(dim=-1)

    rounded = norm(reference.route(r, w)) / n  # at least 1: products cancel in u too
    alpha = norm(reference.route(ar, w) + reference.route(r, aw)) / n
    slope = dc + dc.mT + 4 * dp * pairs
    c_dot = alpha[..., None] + alpha[..., None, :]
    du = ((slope.sum(-1) * rounded) / n).amax()
    u_dot = (((slope + 4 * dp * pairs) * c_dot).sum(-1) * rounded / n).amax()
    d_r, d_w = w.sum((0, 2, 3)).amax(), r.sum((0, 1, 2)).amax()  # per unit of du
    g_r = u_dot * d_r + du * aw.sum((0, 2, 3)).amax()
    g_w = u_dot * d_w + du * ar.sum((0, 1, 2)).amax()
    g_c = (c_dot * rounded[..., None]).amax()
    top = [penalty, rounded.amax(), (n * rounded).amax()]
    return [*top, du * d_r, du * d_w, g_r, g_w, g_c, g_c]


def check_orders(case, dtype, kind, kernels=cpu, seed=0, present=(True, True)):
    inputs = operands(case, dtype, seed)
    exact_inputs = [x.double() for x in inputs]
    exact = all_orders(reference, case, exact_inputs, kind, present)
    eager = all_orders(reference, case, inputs, kind, present)
    with poisoned():
        actual = all_orders(kernels, case, inputs, kind, present)
    # rounding errors of sums over heads, tokens, channels and head widths, all in float32
    terms = case.H + case.B * case.N + case.D + 3 * case.d
    for ours, plain, truth, scale in zip(
        actual, eager, exact, scales(case, exact_inputs, kind, present), strict=True
    ):
        assert ours.dtype == plain.dtype
        assert ours.shape == truth.shape
        unit = scale.float().view(1)
        assert_within_budget(
            torch.cat([ours.flatten().float(), unit]),
            torch.cat([plain.flatten().float(), unit]),
            torch.cat([truth.flatten(), unit.double()]),
            terms=terms,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_within_budget(case, dtype, kind, tile):
    check_orders(case, dtype, kind)


@pytest.mark.parametrize("present", [(True, False), (False, True)], ids=["dr", "dW"])
def test_every_order_without_a_cotangent(present, kind, tile):
    check_orders(CASES["plain"], torch.float32, kind, present=present)


@pytest.mark.parametrize("N", [197, 577])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vit_sizes_within_budget(N, dtype, kind):
    check_orders(Case(B=1, H=4, N=N, d=16, D=64), dtype, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_within_budget_on_lesser_processors(dtype, kind, lesser_processor):
    assert lesser_processor("routed_head_penalty")
    for case in (
        Case(B=2, H=5, N=70, d=20, D=40),
        CASES["twelve-heads"],
        CASES["wider-than-model"],
    ):
        check_orders(case, dtype, kind)


def test_many_chunks_and_blocks(kind):
    """Tokens that fill blocks of several chunks, none of them wholly."""
    check_orders(Case(B=3, H=6, N=601, d=8, D=384), torch.float32, kind)


def test_same_bits_on_any_threads(kind):
    case, before = Case(B=3, H=4, N=65, d=8, D=16), torch.get_num_threads()
    inputs, found = operands(case, torch.float32), []
    try:
        for threads in (1, 2, 64):
            torch.set_num_threads(threads)
            found.append(all_orders(cpu, case, inputs, kind)[:5])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_every_order_of_the_reference_are_the_derivatives_of_the_definition(case, kind):
    """The explicit formulas (42)-(45) against float64 autograd of (40)-(41)."""
    inputs, values = [x.requires_grad_() for x in operands(case)], options(case, kind)
    penalty, cosines = reference.routed_head_penalty(*inputs, *values)
    dp, dc, *dd = cotangents(*inputs, cosines)
    given = [dp.requires_grad_(), dc.requires_grad_()]
    first = torch.autograd.grad((penalty, cosines), inputs, given, create_graph=True)
    second = torch.autograd.grad(first, [*inputs, *given], dd)
    with torch.no_grad():
        norms = reference.routed_head_penalty_forward(*inputs, *values)[2]
        saved = (*inputs, cosines, norms, *given)
        torch.testing.assert_close(
            reference.routed_head_penalty_backward(RoutedHeadPenaltyBackward(*saved, *values)),
            first,
        )
        *ours, gdc = reference.routed_head_penalty_double_backward(
            RoutedHeadPenaltyDoubleBackward(*saved, *dd, *values)
        )
    torch.testing.assert_close(tuple(ours), second[:3])
    torch.testing.assert_close(2 * gdc, second[3] + second[3].mT)  # C is symmetric


@st.composite
def any_case(draw):
    return Case(
        B=draw(st.integers(1, 3)),
        H=draw(st.sampled_from([1, 2, 3, 4, 12, 17])),
        N=draw(st.sampled_from([1, 2, 5, 19])),
        d=draw(st.sampled_from([1, 3, 8])),
        D=draw(st.sampled_from([1, 4, 33])),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        zero=draw(st.sampled_from(["none", "patches"])),
        eps=draw(st.sampled_from([0.1, 1.0])),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    any_case(),
    st.sampled_from(DTYPES),
    st.sampled_from(KINDS),
    st.integers(0, 2**31),
    st.sampled_from([64, 1000, 1 << 19]),
)
def test_any_shape_within_budget(case, dtype, kind, seed, elements):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosine, "TILE_ELEMENTS", elements)
        check_orders(case, dtype, kind, seed=seed)


def test_runs_give_the_same_bits(kind):
    case = Case(B=3, H=4, N=65, d=8, D=16)
    results = (all_orders(cpu, case, operands(case, torch.float32), kind) for _ in range(2))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_zero_gradients_cost_no_nan(kind):
    """All tokens but the first have none, at the default eps, in float32."""
    case = Case(zero="patches")
    ours = WAYS["backward"](
        as_function(case, kind, "penalty"), operands(case, torch.float32), TAILS["nonlinear"]
    )
    exact = WAYS["backward"](defined(case, kind, "penalty"), operands(case), TAILS["nonlinear"])
    for actual, expect in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expect, rtol=1e-3, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any tensor that passes by has memory for."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])
def test_the_routed_gradients_never_exist(kernels, kind, monkeypatch):
    """No order of the CPU kernels makes a quarter of [B, H, N, D]; the reference shows we would see it."""
    monkeypatch.setattr(cosine, "TILE_ELEMENTS", 4096)
    case = Case(B=4, H=4, N=50, d=2, D=64)
    inputs = operands(case, torch.float32)
    with LargestTensor() as seen:
        all_orders(kernels, case, inputs, kind)
    routed = case.B * case.H * case.N * case.D
    assert (seen.elements < routed / 4) == (kernels is cpu)


def test_nothing_of_that_size_is_saved():
    case = Case(B=4, H=4, N=50, d=2, D=64)
    inputs, saved = [x.requires_grad_() for x in operands(case)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        inner = torch.autograd.grad(dvf.routed_head_penalty(*inputs), inputs, create_graph=True)
        sum(g.square().sum() for g in inner)
    assert saved
    assert max(x.numel() for x in saved) <= inputs[0].numel()


def _without_last(blocks):
    return lambda self, width: list(blocks(self, width))[:-1]


def _off_diagonal_only(slope):
    def sabotaged(g, here):
        lam, s, m = slope(g, here)
        m.diagonal(dim1=1, dim2=2).add_(cosine._over_free_norm(s, here.norms, g.eps))
        return cosine.Slope(lam, s, m)

    return sabotaged


def _skipping_last_token(store):
    def sabotaged(self, result, x, t):
        before = x[-1, -1].clone()
        store(self, result, x, t)
        x[-1, -1] = before

    return sabotaged


def _without(name, double_backward):
    def sabotaged(inputs):
        return double_backward(inputs._replace(**{name: None}))

    return sabotaged


def _without_m_dot(curvature):
    return lambda g, here, k: curvature(g, here, k)._replace(m_dot=torch.zeros_like(k))


MISTAKES = {
    "missing tile": (cosine.Grouping, "blocks", _without_last(cosine.Grouping.blocks)),
    "diagonal of M dropped": (cosine, "_slope", _off_diagonal_only(cosine._slope)),
    "M_dot dropped": (cosine, "_curvature", _without_m_dot(cosine._curvature)),
    "unwritten token": (
        routed_blocked._Router,
        "store",
        _skipping_last_token(routed_blocked._Router.store),
    ),
    "pairs divided by H^2": (
        *(cosine.Grouping, "weight"),
        property(lambda g: 1 / (g.H**2 * g.B * (g.N if g.by_token else 1))),
    ),
    **{
        f"{name} dropped": (
            *(cpu, "routed_head_penalty_double_backward"),
            _without(name, cpu.routed_head_penalty_double_backward),
        )
        for name in ("ddgrad_qkv", "ddweight")
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_oracle_bites(mistake, dtype, monkeypatch, tiles_only):
    case, kind = Case(B=2, H=4, N=9, d=4, D=8), ("token", "pairs")
    monkeypatch.setattr(cosine, "TILE_ELEMENTS", 128)
    check_orders(case, dtype, kind)
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises(AssertionError, match=r"exceeds budget|non-finite"):
        check_orders(case, dtype, kind)


class TinyAttention(torch.nn.Module):
    """One attention layer and a classifier, with its projections' results at hand."""

    def __init__(self, D=6, H=3, d=4, classes=5):
        super().__init__()
        self.H, self.d = H, d
        self.qkv = torch.nn.Linear(D, 3 * H * d, dtype=torch.float64)
        self.proj = torch.nn.Linear(H * d, D, dtype=torch.float64)
        self.classify = torch.nn.Linear(D, classes, dtype=torch.float64)

    def forward(self, x):
        projected = self.qkv(x)
        q, k, v = projected.unflatten(-1, (3, self.H, self.d)).permute(2, 0, 3, 1, 4)
        heads = (q @ k.mT / self.d**0.5).softmax(-1) @ v
        y = x + self.proj(heads.transpose(1, 2).flatten(2))
        return self.classify(y.sin().mean(1)), heads, projected


def published_loop(model, x):
    """H backward passes to the layer's input, each with the cotangent masked outside one head."""
    logits, heads, _ = model(x)
    (g,) = torch.autograd.grad(logits.amax(-1).sum(), heads, create_graph=True)
    masks = torch.eye(model.H, dtype=torch.float64)[:, None, :, None, None]
    u = [torch.autograd.grad(heads, x, g * m, create_graph=True)[0] for m in masks]
    return torch.stack(u, 1)


class TestPublishedLoop:
    """An independent route to u_h: no gradient of the projection's output is taken in the loop."""

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return TinyAttention()

    def test_penalty_and_parameter_gradients(self, model, kind):
        x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
        logits, _, projected = model(x)
        (grad,) = torch.autograd.grad(logits.amax(-1).sum(), projected, create_graph=True)
        granularity, reduction = kind
        penalty, cosines = dvf.routed_head_penalty(
            grad.unflatten(-1, (3, model.H, model.d)),
            model.qkv.weight.view(3, model.H, model.d, 6),
            granularity=granularity,
            reduction=reduction,
            return_cosines=True,
        )
        expect, their_cosines = reference.head_penalty(published_loop(model, x), *kind)
        torch.testing.assert_close(penalty, expect)
        torch.testing.assert_close(cosines, their_cosines)

        parameters = [model.qkv.weight, model.qkv.bias, model.proj.weight, model.classify.weight, x]
        ours, theirs = (torch.autograd.grad(p, parameters) for p in (penalty, expect))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_is_the_penalty_of_explicit_gradients(kind):
    r, w = operands(Case(B=2, H=5, N=4, d=3, D=7))
    given = {"granularity": kind[0], "reduction": kind[1], "return_cosines": True}
    explicit = sum(r[:, :, c].transpose(1, 2) @ w[c] for c in range(3))
    torch.testing.assert_close(
        dvf.routed_head_penalty(r, w, **given), dvf.head_penalty(explicit, **given)
    )


def test_relabelling_heads_permutes_the_cosines(kind):
    r, w = operands(Case(H=5))
    order = torch.tensor([3, 0, 4, 2, 1])
    given = {"granularity": kind[0], "reduction": kind[1], "return_cosines": True}
    penalty, cosines = dvf.routed_head_penalty(r, w, **given)
    permuted, others = dvf.routed_head_penalty(r[:, :, :, order], w[:, order], **given)
    torch.testing.assert_close(others, cosines[..., order, :][..., order])
    torch.testing.assert_close(permuted, penalty)


def test_heads_that_write_to_separate_channels_have_no_penalty(kind):
    weight = torch.zeros(3, 4, 2, 8)
    for h in range(4):
        weight[:, h, :, 2 * h : 2 * h + 2] = torch.randn(3, 2, 2)
    r = torch.randn(2, 3, 3, 4, 2)
    assert dvf.routed_head_penalty(r, weight, granularity=kind[0], reduction=kind[1]) == 0


class TestFunctorch:
    """torch.func and forward mode agree with the definition, or raise."""

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, r, w: torch.func.jacrev(f, argnums=(0, 1))(r, w),
            lambda f, r, w: torch.func.grad(
                lambda y: torch.func.grad(lambda z: f(r, z).sum())(y).sin().sum()
            )(w),
            lambda f, r, w: torch.func.vmap(
                torch.func.grad(lambda x, y: f(x[None], y).sin().sum(), argnums=(0, 1)), (0, None)
            )(r, w),
            lambda f, r, w: torch.func.jvp(f, (r, w), (r.cos(), w.sin()))[1],
            lambda f, r, w: torch.func.hessian(lambda x: f(x, w).sin().sum())(r),
        ],
        ids=["jacrev", "grad of grad", "vmap of grad", "jvp", "hessian"],
    )
    def test_transform(self, transform, kind):
        case = CASES["plain"]
        torch.testing.assert_close(
            transform(as_function(case, kind), *operands(case)),
            transform(defined(case, kind), *operands(case)),
        )

    def test_forward_mode_over_a_recorded_backward_refuses(self):
        inputs = [x.requires_grad_() for x in operands(Case())]
        penalty = dvf.routed_head_penalty(*inputs)
        with forward_ad.dual_level():
            tangent = forward_ad.make_dual(torch.ones_like(penalty), torch.ones_like(penalty))
            with pytest.raises(UnsupportedError, match="forward-mode"):
                torch.autograd.grad(penalty, inputs, tangent)


def test_third_derivative_refuses():
    r, w = (x.requires_grad_() for x in operands(Case()))
    grad = torch.autograd.grad
    first = grad(dvf.routed_head_penalty(r, w), w, create_graph=True)[0]
    second = grad(first.square().sum(), w, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match="routed_head_penalty is differentiable twice"):
        grad(second.sum(), w)


def test_compiled_forward():
    """The forward in one graph, with an eager first derivative; a second one raises."""
    torch._dynamo.reset()
    case = CASES["plain"]
    f = as_function(case, KINDS[0])
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    inputs = [x.requires_grad_() for x in operands(case)]
    ours, eager = compiled(*inputs), f(*inputs)
    torch.testing.assert_close(ours, eager)
    first, expect = (torch.autograd.grad(y.sin().sum(), inputs) for y in (ours, eager))
    torch.testing.assert_close(first, expect)
    with pytest.raises(RuntimeError, match=r"double backward|donated buffers"):
        WAYS["autograd.grad"](compiled, operands(case), TAILS["linear"])


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids="-".join)
@pytest.mark.parametrize(
    ("layout", "absent"),
    [("slice", "none"), ("dense", "dp, ddweight"), ("dense", "dc, ddgrad_qkv")],
)
def test_contracts(kind, absent, layout):
    values = (*kind, 1e-12)
    r, w = (x.detach().requires_grad_() for x in operands(Case(layout=layout)))
    statistics = [x.detach() for x in ops.routed_head_penalty_operator(r, w, *values)[1:]]
    dp, dc, ar, aw = cotangents(r.detach(), w.detach(), statistics[0])
    dp = None if "dp" in absent else dp.requires_grad_()
    dc = None if "dc" in absent else dc.requires_grad_()
    given = (r, w, *statistics, dp, dc)
    torch.library.opcheck(ops.routed_head_penalty_operator, (r, w, *values))
    torch.library.opcheck(ops.routed_head_penalty_backward_operator, (*given, *values))
    plain = [x if x is None else x.detach() for x in given]
    dd = [None if "ddgrad_qkv" in absent else ar, None if "ddweight" in absent else aw]
    torch.library.opcheck(ops.routed_head_penalty_double_backward_operator, (*plain, *dd, *values))


def test_autocast_changes_nothing(kind):
    f, inputs = as_function(CASES["plain"], kind), operands(CASES["plain"], torch.float32)
    plain = WAYS["backward"](f, inputs, TAILS["nonlinear"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = WAYS["backward"](f, inputs, TAILS["nonlinear"])
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


def test_autocast_lets_the_dtypes_differ(kind):
    """bfloat16 gradients of a float32 weight: each result has its operand's dtype."""
    case = CASES["plain"]
    r, w = operands(case, torch.float32)
    r = r.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = WAYS["backward"](as_function(case, kind), [r, w], TAILS["nonlinear"])
    wide = WAYS["backward"](as_function(case, kind), [r.float(), w], TAILS["nonlinear"])
    assert [x.dtype for x in ours] == [torch.bfloat16, torch.float32]
    for low, high in zip(ours, wide, strict=True):  # the inner gradient is rounded to bfloat16
        assert (low.float() - high).abs().max() < 0.02 * high.abs().max()


@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_backends_agree(name, kind):
    case = CASES["plain"]
    with dvf.use_backend(name):
        actual = WAYS["backward"](as_function(case, kind), operands(case), TAILS["nonlinear"])
    torch.testing.assert_close(
        actual, WAYS["backward"](defined(case, kind), operands(case), TAILS["nonlinear"])
    )


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, kwargs))
        return func(*args, **(kwargs or {}))


def test_takes_part_in_overrides():
    inputs = operands(Case())
    with Recorder() as seen:
        dvf.routed_head_penalty(*inputs, reduction="pairs")
    kwargs = {"granularity": "token", "reduction": "pairs", "eps": 1e-12, "return_cosines": False}
    assert (dvf.routed_head_penalty, kwargs) in seen.calls


BAD = {
    "not a tensor": (lambda r, w: (r.tolist(), w), {}, "grad_qkv: expected a tensor, got list"),
    "integer": (lambda r, w: (r, w.long()), {}, "weight_qkv: expected a floating dtype"),
    "axes": (lambda r, w: (r[0], w), {}, "grad_qkv: expected shape [B, N, 3, H, d]"),
    "not three": (lambda r, w: (r[:, :, :2], w), {}, "grad_qkv: expected shape [B, N, 3, H, d]"),
    "no samples": (lambda r, w: (r[:0], w), {}, "grad_qkv: expected shape [B, N, 3, H, d], none"),
    "no tokens": (lambda r, w: (r[:, :0], w), {}, "grad_qkv: expected shape [B, N, 3, H, d], none"),
    "weight axes": (lambda r, w: (r, w[0]), {}, "weight_qkv: expected shape [3, 3, 2, D]"),
    "heads": (lambda r, w: (r, w[:, :2]), {}, "weight_qkv: expected shape [3, 3, 2, D]"),
    "width": (lambda r, w: (r, w[:, :, :1]), {}, "weight_qkv: expected shape [3, 3, 2, D]"),
    "no model": (lambda r, w: (r, w[..., :0]), {}, "weight_qkv: expected shape [3, 3, 2, D]"),
    "dtype": (
        lambda r, w: (r, w.float()),
        {},
        "weight_qkv: expected dtype torch.float64 like grad_qkv",
    ),
    "device": (lambda r, w: (r, w.to("meta")), {}, "weight_qkv: expected device cpu like grad_qkv"),
    "granularity": (lambda r, w: (r, w), {"granularity": "head"}, "granularity: expected one of"),
    "reduction": (lambda r, w: (r, w), {"reduction": "sum"}, "reduction: expected one of"),
    "eps": (lambda r, w: (r, w), {"eps": 0.0}, "eps: expected a finite number of at least"),
    "one head": (
        lambda r, w: (r[:, :, :, :1], w[:, :1]),
        {"reduction": "pairs"},
        "reduction: expected 'all' for one head",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    change, given, message = BAD[name]
    with pytest.raises(UsageError) as failure:
        dvf.routed_head_penalty(*change(*operands(Case())), **given)
    assert str(failure.value).startswith(message), failure.value
    assert "\n" not in str(failure.value)
    assert "; " in str(failure.value)


def test_devices_must_match_under_autocast_too():
    r, w = operands(Case())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="device cpu like"):
        dvf.routed_head_penalty(r, w.to("meta"))
