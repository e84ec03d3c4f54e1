"""The head penalty equals its definition to second order, at any shape, layout and dtype it accepts."""

import importlib
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.overrides import TorchFunctionMode

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import HeadPenaltyBackward, HeadPenaltyDoubleBackward
from diversevit_kernels.cpu.head_penalty import cosine
from diversevit_kernels.cpu.head_penalty import plain as cpu
from tests.helpers.second_order import TAILS, WAYS

ops = importlib.import_module("diversevit_fast.ops.head_penalty")


class Case(NamedTuple):
    """Sizes; ``layout`` of the gradients; ``zero``: which of them vanish; ``eps`` of the clamp."""

    B: int = 2
    H: int = 3
    N: int = 3
    E: int = 2
    layout: str = "BNHE"
    zero: str = "none"
    eps: float = 1e-12


CASES = {
    "plain": Case(),
    "one-head": Case(H=1, N=2),
    "four-heads": Case(B=1, H=4, layout="BHNE"),
    "twelve-heads": Case(B=1, H=12, N=1, E=3),
    "seventeen-heads": Case(B=1, H=17, N=1),
    "one-channel": Case(E=1, layout="BHNE"),
    "width-first": Case(layout="BHEN"),
    "no-dense-axis": Case(layout="slice"),
    "expanded": Case(layout="expanded"),
    "clamped": Case(eps=0.8),
    "zero-head": Case(zero="head", eps=0.1),
    "class-token": Case(zero="patches", eps=0.1),
    "all-zero": Case(zero="all", eps=0.1),
}

LAYOUTS = {
    "BHNE": lambda x: x.contiguous(),
    "BNHE": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "BHEN": lambda x: x.mT.contiguous().mT,
    "slice": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, 1)[:, ::2, :, ::2],
    "expanded": lambda x: x[:1, :, :1].expand(x.shape),
}

ZEROS = {
    "none": (..., slice(0, 0)),
    "head": (slice(None), 1, slice(1, None)),  # one head, all tokens but the first
    "patches": (slice(None), slice(None), slice(1, None)),  # what class-token pooling gives
    "all": ...,
}

KINDS = [(g, r) for g in ops.GRANULARITIES for r in ops.REDUCTIONS]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def gradients(case, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.B, case.H, case.N, case.E, generator=g, dtype=torch.float64).to(dtype)
    x[ZEROS[case.zero]] = 0
    return LAYOUTS[case.layout](x)


def leaf_and_function(case, kind, results="both"):
    """Dense gradients to differentiate, and the penalty of them in the case's layout."""
    f = as_function(case, kind, results)
    leaf = gradients(case._replace(layout="BHNE")).requires_grad_()
    return leaf, lambda x: f(LAYOUTS[case.layout](x))


def options(case, kind):
    granularity, reduction = kind
    return {
        "granularity": granularity,
        "reduction": "all" if case.H == 1 else reduction,
        "eps": case.eps,
    }


def as_function(case, kind, results="both"):
    """The penalty, the cosines, or both in one tensor, so that each cotangent is sometimes absent."""

    def f(grads, penalise=dvf.head_penalty):
        given = options(case, kind)
        if penalise is dvf.head_penalty:
            given["return_cosines"] = True
        penalty, cosines = penalise(grads, **given)
        both = {"penalty": penalty, "cosines": cosines}
        return both[results] if results in both else torch.cat([penalty[None], cosines.flatten()])

    return f


def defined(f):
    """``f`` of ``as_function`` with the definition in place of the operator."""
    return lambda grads: f(grads, reference.head_penalty)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture(params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture(params=[None, 12], ids=["one-tile", "small-tiles"])
def tile(request, monkeypatch):
    """Tiles of the size users get, and of two tokens or so: many, and a ragged last one."""
    if request.param:
        monkeypatch.setattr(cosine, "TILE_ELEMENTS", request.param)


@contextmanager
def poisoned():
    """Uninitialised memory holds NaN, so what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_first_and_second_derivative(case, kind, tile):
    leaf, f = leaf_and_function(case, kind)
    assert gradcheck(f, leaf, fast_mode=True)
    assert gradgradcheck(f, leaf, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "clamped", "zero-head"])
@pytest.mark.parametrize("results", ["penalty", "cosines", "both"])
def test_derivatives_entry_by_entry(name, results, kind):
    """The full Jacobians, with each cotangent absent once."""
    leaf, f = leaf_and_function(CASES[name]._replace(N=2), kind, results)
    assert gradcheck(f, leaf)
    assert gradgradcheck(f, leaf)


def test_equals_the_definition(case, kind, tile):
    grads, f = gradients(case), as_function(case, kind)
    torch.testing.assert_close(f(grads), defined(f)(grads), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("results", "kind"), [("penalty", KINDS[0]), ("both", KINDS[3])], ids=str)
def test_every_way_of_asking_twice(results, kind, way, tail):
    f = as_function(CASES["plain"], kind, results)
    expect = WAYS["autograd.grad"](defined(f), [gradients(CASES["plain"])], TAILS[tail])
    actual = WAYS[way](f, [gradients(CASES["plain"])], TAILS[tail])
    torch.testing.assert_close(list(actual), list(expect), rtol=1e-10, atol=1e-10)


def cotangents(grads, cosines, seed=1):
    """Cotangents of the penalty, the cosines and the backward's result."""
    g = torch.Generator().manual_seed(seed)
    likes = cosines.new_empty(()), cosines, grads
    return [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in likes]


def all_orders(kernels, case, grads, kind):
    """All results of the three orders, in order."""
    kind = tuple(options(case, kind).values())
    penalty, cosines, norms = kernels.head_penalty_forward(grads, *kind)
    dp, dc, a = cotangents(grads, cosines)
    given = (grads, cosines, norms, dp, dc)
    first = kernels.head_penalty_backward(HeadPenaltyBackward(*given, *kind))
    second = kernels.head_penalty_double_backward(HeadPenaltyDoubleBackward(*given, a, *kind))
    return [penalty, cosines, norms, first, *second]


def scales(case, grads, kind):
    """Of each result of ``all_orders``, the largest sum of absolute terms: what is rounded if they cancel.

    Where heads have one channel the cosines are +-1 and every derivative is a sum that cancels.
    """
    granularity, reduction, eps = options(case, kind).values()
    penalty, c, n = reference.head_penalty_forward(grads, granularity, reduction, eps)
    dp, dc, a = (x.abs() for x in cotangents(grads, c))
    pairs = reference.pair_weights(grads, granularity, reduction)
    alpha = reference.by_group(a, granularity).norm(dim=-1) / n
    c_dot = alpha[..., None] + alpha[..., None, :]
    lam = dc + dc.mT + 4 * dp * pairs * c.abs()
    first = (lam.sum(-1) / n).amax()
    second = ((lam * c_dot + 4 * dp * pairs * c_dot).sum(-1) / n).amax()
    return [
        penalty,
        c.abs().amax(),
        n.amax(),
        first,
        second,
        (pairs * c_dot * c.abs()).sum(),
        c_dot.amax(),
    ]


def check_orders(case, dtype, kind, kernels=cpu, seed=0):
    grads = gradients(case, dtype, seed)
    exact = all_orders(reference, case, grads.double(), kind)
    eager = all_orders(reference, case, grads, kind)
    with poisoned():
        actual = all_orders(kernels, case, grads, kind)
    # sums over heads of sums over channels (and tokens), and over samples, all in float32
    terms = case.H * case.N * case.E + case.B * case.H**2
    for ours, plain, truth, scale in zip(
        actual, eager, exact, scales(case, grads.double(), kind), strict=True
    ):
        assert ours.dtype == plain.dtype
        assert_scaled_within_budget(ours, plain, truth, scale, terms=terms)


def assert_scaled_within_budget(ours, plain, truth, scale, terms):
    """``assert_within_budget`` in float32 arithmetic, with ``scale`` for the floor's magnitude."""
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


@pytest.mark.parametrize("N", [197, 577])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vit_sizes_within_budget(N, dtype, kind):
    check_orders(Case(B=1, H=4, N=N, E=64), dtype, kind)


def test_every_order_of_the_reference_are_the_derivatives_of_the_definition(case, kind):
    """The explicit formulas (33)-(39) against float64 autograd of (30)-(32)."""
    grads, values = gradients(case).detach().requires_grad_(), tuple(options(case, kind).values())
    penalty, cosines = reference.head_penalty(grads, *values)
    dp, dc = torch.randn_like(penalty).requires_grad_(), torch.randn_like(cosines).requires_grad_()
    (dg,) = torch.autograd.grad((penalty, cosines), grads, (dp, dc), create_graph=True)
    a = torch.randn_like(dg)
    second = torch.autograd.grad(dg, (grads, dp, dc), a)
    with torch.no_grad():
        norms = reference.head_penalty_forward(grads, *values)[2]
        given = (grads, cosines, norms, dp, dc)
        ours = reference.head_penalty_double_backward(HeadPenaltyDoubleBackward(*given, a, *values))
        torch.testing.assert_close(
            reference.head_penalty_backward(HeadPenaltyBackward(*given, *values)), dg
        )
    torch.testing.assert_close(ours[:2], second[:2])
    torch.testing.assert_close(2 * ours[2], second[2] + second[2].mT)  # C is symmetric


@st.composite
def any_case(draw):
    return Case(
        B=draw(st.integers(1, 3)),
        H=draw(st.sampled_from([1, 2, 3, 4, 12, 17])),
        N=draw(st.sampled_from([1, 2, 5, 33])),
        E=draw(st.sampled_from([1, 3, 8, 65])),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        zero=draw(st.sampled_from(["none", "patches"])),
        eps=draw(st.sampled_from([0.1, 1.0])),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
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
    case = Case(B=3, H=4, N=65, E=16)
    results = (all_orders(cpu, case, gradients(case, torch.float32), kind) for _ in range(2))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("zero", ["head", "patches", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_gradients_cost_no_nan(zero, dtype, kind):
    """At the default eps: cosine 0, and the derivatives are those of the definition in float64."""
    case = Case(zero=zero)
    grads, f = gradients(case, dtype), as_function(case, kind)
    cosines = as_function(case, kind, "cosines")(grads)
    assert torch.equal(
        cosines, cosines.where(defined(as_function(case, kind, "cosines"))(grads) != 0, 0)
    )
    penalty = as_function(case, kind, "penalty")
    (ours,) = WAYS["backward"](penalty, [grads], TAILS["nonlinear"])
    (exact,) = WAYS["backward"](defined(penalty), [grads.double()], TAILS["nonlinear"])
    assert torch.isfinite(ours).all()
    rtol = 1e-4 if dtype == torch.float32 else 1e-9
    scale = exact.abs().amax((0, 2, 3), keepdim=True).clamp_min(1e-30)  # 1e24 in a zero head
    torch.testing.assert_close(ours.double() / scale, exact / scale, rtol=rtol, atol=rtol)
    (first,) = torch.autograd.grad(f(x := grads.clone().requires_grad_()).sum(), x)
    assert torch.isfinite(first).all()


MISTAKES = {
    "missing tile": lambda patch: patch.setattr(
        cosine.Grouping, "blocks", _without_last(cosine.Grouping.blocks)
    ),
    "diagonal of M dropped": lambda patch: patch.setattr(
        cosine, "_slope", _off_diagonal_only(cosine._slope)
    ),
    "clamped norms differentiated": lambda patch: patch.setattr(
        cosine, "_over_free_norm", lambda x, n, eps: x.div(n).div_(n)
    ),
    "M_dot dropped": lambda patch: patch.setattr(
        cosine, "_curvature", _without_m_dot(cosine._curvature)
    ),
    "unwritten token": lambda patch: patch.setattr(
        cpu._Loader, "store", _skipping_last_token(cpu._Loader.store)
    ),
    "pairs divided by H^2": lambda patch: patch.setattr(
        cosine.Grouping,
        "weight",
        property(lambda g: 1 / (g.H**2 * g.B * (g.N if g.by_token else 1))),
    ),
}


def _without_last(blocks):
    return lambda self, width: list(blocks(self, width))[:-1]


def _off_diagonal_only(slope):
    def sabotaged(g, here):
        lam, s, m = slope(g, here)
        m.diagonal(dim1=1, dim2=2).add_(cosine._over_free_norm(s, here.norms, g.eps))
        return cosine.Slope(lam, s, m)

    return sabotaged


def _without_m_dot(curvature):
    return lambda g, here, k: curvature(g, here, k)._replace(m_dot=torch.zeros_like(k))


def _skipping_last_token(store):
    def sabotaged(self, result, x, t):
        before = x[-1, :, -1].clone()
        store(self, result, x, t)
        x[-1, :, -1] = before

    return sabotaged


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_oracle_bites(mistake, dtype, monkeypatch):
    case, kind = Case(B=2, H=4, N=9, E=8, eps=2.7), ("token", "pairs")
    monkeypatch.setattr(cosine, "TILE_ELEMENTS", 128)
    check_orders(case, dtype, kind)
    MISTAKES[mistake](monkeypatch)
    with pytest.raises(AssertionError, match=r"exceeds budget|non-finite"):
        check_orders(case, dtype, kind)


class TestLaws:
    """What the penalty means, whatever the kernel."""

    @pytest.fixture
    def grads(self, device):
        return gradients(Case(H=5, N=4, E=7)).to(device)

    def test_relabelling_heads_permutes_the_cosines(self, grads, kind):
        order = torch.tensor([3, 0, 4, 2, 1], device=grads.device)
        f = {"granularity": kind[0], "reduction": kind[1], "return_cosines": True}
        penalty, cosines = dvf.head_penalty(grads, **f)
        permuted, others = dvf.head_penalty(grads[:, order], **f)
        torch.testing.assert_close(others, cosines[..., order, :][..., order])
        torch.testing.assert_close(permuted, penalty)

    def test_scaling_a_head_changes_no_cosine(self, grads, kind):
        f = as_function(Case(H=5), kind)
        factors = torch.tensor([1, 1e-3, 1, 50, 1], device=grads.device)
        torch.testing.assert_close(f(grads * factors[:, None, None]), f(grads))

    def test_orthogonal_heads_have_no_penalty(self, kind, device):
        grads = torch.eye(5).expand(2, 3, 5, 5).transpose(1, 2) * torch.rand(2, 5, 3, 1)
        assert as_function(Case(), kind, "penalty")(grads.to(device)) == 0

    def test_parallel_heads_have_the_largest_penalty(self, kind, device):
        head = torch.randn(2, 1, 3, 7, dtype=torch.float64)
        grads = head * torch.tensor([1.0, -2.0, 3.0, 0.5])[:, None, None]
        penalty = as_function(Case(), kind, "penalty")(grads.to(device))
        torch.testing.assert_close(penalty.item(), 3 / 4 if kind[1] == "all" else 1.0)

    def test_penalty_lies_in_the_unit_interval(self, kind, device):
        for seed in range(20):
            case = Case(H=2 + seed % 5, E=1 + seed % 3)
            grads = gradients(case, torch.float32, seed).to(device)
            penalty = as_function(case, kind, "penalty")(grads)
            assert 0 <= penalty <= 1 + 1e-6

    def test_by_sample_is_by_token_of_one_flat_token(self, grads):
        flat = grads.flatten(2).unsqueeze(2)
        torch.testing.assert_close(
            dvf.head_penalty(grads, granularity="sample"),
            dvf.head_penalty(flat, granularity="token"),
        )

    def test_reductions_differ_by_the_share_of_the_diagonal(self, grads):
        torch.testing.assert_close(
            dvf.head_penalty(grads) * 25, dvf.head_penalty(grads, reduction="pairs") * 20
        )


class TestFunctorch:
    """torch.func and forward mode agree with the definition, or raise."""

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, x: torch.func.jacrev(f)(x),
            lambda f, x: torch.func.grad(
                lambda y: torch.func.grad(lambda z: f(z).sum())(y).sin().sum()
            )(x),
            lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y[None]).sin().sum()))(x),
            lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
            lambda f, x: torch.func.hessian(lambda y: f(y).sin().sum())(x),
        ],
        ids=["jacrev", "grad of grad", "vmap of grad", "jvp", "hessian"],
    )
    def test_transform(self, transform, kind):
        f, grads = as_function(CASES["plain"], kind), gradients(CASES["plain"])
        torch.testing.assert_close(transform(f, grads), transform(defined(f), grads))

    def test_forward_mode_over_a_recorded_backward_refuses(self):
        grads = gradients(Case()).requires_grad_()
        penalty = dvf.head_penalty(grads)
        with forward_ad.dual_level():
            tangent = forward_ad.make_dual(torch.ones_like(penalty), torch.ones_like(penalty))
            with pytest.raises(UnsupportedError, match="forward-mode"):
                torch.autograd.grad(penalty, grads, tangent)

    def test_forward_mode_under_autocast_keeps_the_dtype(self):
        grads = gradients(Case(E=40), torch.float32)
        plain = torch.func.jvp(dvf.head_penalty, (grads,), (grads.cos(),))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(
                torch.func.jvp(dvf.head_penalty, (grads,), (grads.cos(),)), plain
            )


def test_third_derivative_refuses():
    grads, grad = gradients(Case()).requires_grad_(), torch.autograd.grad
    first = grad(dvf.head_penalty(grads), grads, create_graph=True)[0]
    second = grad(first.square().sum(), grads, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match="head_penalty is differentiable twice"):
        grad(second.sum(), grads)


def test_compiled_forward(kind):
    """The forward in one graph, with an eager first derivative; a second one raises."""
    torch._dynamo.reset()
    f = as_function(CASES["plain"], kind)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    grads = gradients(CASES["plain"]).requires_grad_()
    ours, eager = compiled(grads), f(grads)
    torch.testing.assert_close(ours, eager)
    (first,), (expect,) = (torch.autograd.grad(y.sin().sum(), grads) for y in (ours, eager))
    torch.testing.assert_close(first, expect)
    with pytest.raises(RuntimeError, match=r"double backward|donated buffers"):
        WAYS["autograd.grad"](compiled, [gradients(CASES["plain"])], TAILS["linear"])


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids="-".join)
@pytest.mark.parametrize(
    ("layout", "absent"), [("slice", "none"), ("BNHE", "dpenalty"), ("BNHE", "dcosines")]
)
def test_contracts(kind, absent, layout):
    values = (*kind, 1e-12)
    grads = gradients(Case(layout=layout)).requires_grad_()
    penalty, cosines, norms = (x.detach() for x in ops.head_penalty_operator(grads, *values))
    dp = None if absent == "dpenalty" else torch.randn_like(penalty).requires_grad_()
    dc = None if absent == "dcosines" else torch.randn_like(cosines).requires_grad_()
    given = (grads, cosines, norms, dp, dc)
    torch.library.opcheck(ops.head_penalty_operator, (grads, *values))
    torch.library.opcheck(ops.head_penalty_backward_operator, (*given, *values))
    plain = [x if x is None else x.detach() for x in given]
    torch.library.opcheck(
        ops.head_penalty_double_backward_operator, (*plain, torch.randn_like(plain[0]), *values)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(dtype, kind):
    f = as_function(CASES["plain"], kind)
    grads = gradients(CASES["plain"], dtype)
    plain = WAYS["backward"](f, [grads], TAILS["nonlinear"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = WAYS["backward"](f, [grads], TAILS["nonlinear"])
        assert f(grads).dtype == torch.float32
    assert torch.equal(cast[0], plain[0])


@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_backends_agree(name, kind):
    f, grads = as_function(CASES["plain"], kind), [gradients(CASES["plain"])]
    with dvf.use_backend(name):
        actual = WAYS["backward"](f, grads, TAILS["nonlinear"])
    torch.testing.assert_close(actual, WAYS["backward"](defined(f), grads, TAILS["nonlinear"]))


class Recorder(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, kwargs))
        return func(*args, **(kwargs or {}))


def test_takes_part_in_overrides():
    grads = gradients(Case())
    with Recorder() as seen:
        penalty, cosines = dvf.head_penalty(grads, granularity="sample", return_cosines=True)
    assert penalty.ndim == 0
    assert cosines.shape == (2, 3, 3)
    kwargs = {"granularity": "sample", "reduction": "all", "eps": 1e-12, "return_cosines": True}
    assert (dvf.head_penalty, kwargs) in seen.calls


BAD = {
    "not a tensor": (lambda x: x.tolist(), {}, "grads: expected a tensor, got list"),
    "integer": (lambda x: x.long(), {}, "grads: expected a floating dtype"),
    "sparse": (lambda x: x.to_sparse(), {}, "grads: expected a dense strided tensor"),
    "three axes": (lambda x: x[0], {}, "grads: expected shape [B, H, N, E]"),
    "no samples": (lambda x: x[:0], {}, "grads: expected shape [B, H, N, E], none of them zero"),
    "no tokens": (
        lambda x: x[:, :, :0],
        {},
        "grads: expected shape [B, H, N, E], none of them zero",
    ),
    "granularity": (
        lambda x: x,
        {"granularity": "head"},
        "granularity: expected one of 'token', 'sample'",
    ),
    "reduction": (lambda x: x, {"reduction": "sum"}, "reduction: expected one of 'all', 'pairs'"),
    "one head": (
        lambda x: x[:, :1],
        {"reduction": "pairs"},
        "reduction: expected 'all' for one head",
    ),
    "no eps": (lambda x: x, {"eps": 0.0}, "eps: expected a finite number of at least"),
    "negative eps": (lambda x: x, {"eps": -1e-12}, "eps: expected a finite number of at least"),
    "NaN eps": (lambda x: x, {"eps": float("nan")}, "eps: expected a finite number of at least"),
    "eps underflows": (
        lambda x: x.float(),
        {"eps": 1e-30},
        "eps: expected a finite number of at least 1.1e-19",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    change, given, message = BAD[name]
    with pytest.raises(UsageError) as failure:
        dvf.head_penalty(change(gradients(Case())), **given)
    assert str(failure.value).startswith(message), failure.value
    assert "\n" not in str(failure.value)
    assert "; " in str(failure.value)
