"""Attention dropout equals its definition to second order, with the same weights dropped in every order."""

import importlib
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_fast.ops import reference
from diversevit_fast.ops.attention_qkvpacked import split_qkv
from diversevit_kernels.common.dropout import kept_by
from diversevit_kernels.cpu.attention import dispatch as cpu
from tests.helpers.attention_cases import (
    DROPOUT,
    DTYPES,
    Case,
    any_case,
    as_function,
    check_contracts,
    check_orders,
    differentiable,
    operands,
    use_tiles,
    with_one_seed,
)
from tests.helpers.second_order import TAILS, WAYS
from tests.helpers.versions import traces_gradients

ops = importlib.import_module("diversevit_fast.ops.attention")
P = 0.4


@pytest.fixture(params=DROPOUT.values(), ids=DROPOUT.keys())
def case(request):
    return request.param


def qkv(N=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 3, N, 4, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(3)
    ]


dropped = with_one_seed(lambda *args, **options: dvf.attention(*args, dropout_p=P, **options))


def expected(*args, **options):
    """The definition with the weights that ``dropped`` drops."""
    return with_one_seed(reference.attention)(*args, dropout_p=P, **options)


@pytest.mark.parametrize("tile", ["native", 72], indirect=True)
def test_first_and_second_derivative(case, tile):
    q, k, v, mask, causal = operands(case)
    inputs = [x.detach().requires_grad_() for x in differentiable(q, k, v, mask)]
    f = as_function(case, mask, causal)
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_within_budget(case, dtype, tile):
    check_orders(cpu, case, dtype)


@pytest.mark.parametrize("N", [197, 577])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_vit_sizes_within_budget(N, dtype):
    sizes = {"Nq": N, "Nk": N, "d": 64, "dv": 64, "layout": "projection"}
    check_orders(cpu, Case(H=2, dropout=0.1, **sizes), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    any_case((0.05, 0.5, 0.9)),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.sampled_from([None, 400, 4000, 1 << 20]),
)
def test_any_shape_within_budget(case, dtype, seed, tile):
    case = case._replace(Nq=max(2, case.Nq)) if case.mask == "empty-row" else case
    with pytest.MonkeyPatch.context() as patch:
        if tile:
            use_tiles(patch, tile)
        check_orders(cpu, case, dtype, seed=seed)


def test_the_definition_is_pytorch_s_dropout(monkeypatch):
    """Softmax, ``F.dropout`` with these weights, product: what people write by hand."""
    q, k, v = qkv()
    torch.manual_seed(3)
    kept = kept_by(ops.drawn_seed(q, P), (2, 3, 5, 5), P)
    assert 0 < kept.sum() < kept.numel()
    plain = ((q @ k.mT / 2).softmax(-1) * kept / (1 - P)) @ v
    torch.testing.assert_close(dropped(q, k, v), plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
def test_every_way_of_asking_twice(way, tail, recwarn):
    inputs = [x.detach() for x in qkv()]
    expect = WAYS["autograd.grad"](expected, inputs, TAILS[tail])
    torch.manual_seed(3)  # of the compiled graph, which cannot set it
    ours = partial(dvf.attention, dropout_p=P) if "compiled" in way else dropped
    actual = WAYS[way](ours, inputs, TAILS[tail])
    torch.testing.assert_close(list(actual), list(expect), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("queries", [None, 2])
@pytest.mark.parametrize("tail", TAILS)
def test_packed(tail, queries):
    """The same weights as of three tensors, in every order."""
    x = torch.stack([y.detach() for y in qkv()]).permute(1, 3, 0, 2, 4).contiguous()

    def ours(x):
        torch.manual_seed(3)
        return dvf.attention_qkvpacked(x, dropout_p=P, queries=queries, is_causal=True)

    def parts(x):
        q, k, v = split_qkv(x, queries)
        return expected(q, k, v, is_causal=True).transpose(1, 2)

    found, wanted = (WAYS["autograd.grad"](f, [x], TAILS[tail]) for f in (ours, parts))
    torch.testing.assert_close(list(found), list(wanted))


def test_no_dropout_is_as_before():
    """Bit for bit, and no random number is drawn."""
    x = qkv(dtype=torch.float32)
    before = torch.get_rng_state()
    assert torch.equal(dvf.attention(*x, dropout_p=0), dvf.attention(*x))
    assert torch.equal(torch.get_rng_state(), before)


def test_calls_differ_and_repeat_by_seed():
    x = qkv(dtype=torch.float32)
    torch.manual_seed(0)
    one, two = (dvf.attention(*x, dropout_p=P) for _ in range(2))
    torch.manual_seed(0)
    again = dvf.attention(*x, dropout_p=P)
    assert not torch.equal(one, two)
    assert torch.equal(one, again)


def test_the_mean_is_attention():
    """Over many seeds; 4 standard errors."""
    q, k, v = (x.detach()[:1, :1] for x in qkv())
    many = [x.expand(20000, 1, *x.shape[2:]) for x in (q, k, v)]
    o = dvf.attention(*many, dropout_p=P)
    error = o.std(0) / 20000**0.5
    assert ((o.mean(0) - dvf.attention(q, k, v)[0]).abs() < 4 * error).all()


def test_a_graph_keeps_its_own_weights():
    """The backward passes of two calls, run in the other order and with random numbers drawn between."""
    x = qkv()
    torch.manual_seed(3)
    one, two = (dvf.attention(*x, dropout_p=P) for _ in range(2))
    torch.rand(7)
    torch.autograd.grad(two.sum(), x)
    found = torch.autograd.grad(one.sin().sum(), x)
    wanted = torch.autograd.grad(dropped(*x).sin().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan"), 1.5, torch.tensor(0.1)])
def test_what_is_no_probability(p):
    message = r"dropout_p: expected a probability in \[0, 1\)"
    with pytest.raises(UsageError, match=message):
        dvf.attention(*qkv(), dropout_p=p)
    with pytest.raises(UsageError, match=message):
        dvf.attention_qkvpacked(torch.randn(1, 3, 3, 2, 4), dropout_p=p)


@pytest.mark.parametrize("kind", ["none", "additive"])
def test_contracts(kind):
    check_contracts(kind, dropout=P)


class TestTransforms:
    def test_grad_of_grad(self):
        def penalty(attend):
            def f(q, k, v):
                def inner(q, k, v):
                    return attend(q, k, v).sin().sum()

                grads = torch.func.grad(inner, (0, 1, 2))(q, k, v)
                return sum(g.square().sum() for g in grads)

            return torch.func.grad(f, (0, 1, 2))(*(x.detach() for x in qkv()))

        torch.testing.assert_close(penalty(dropped), penalty(expected))

    def test_vjp_and_jacrev(self):
        q, k, v = (x.detach() for x in qkv(3))
        for f in (dropped, expected):
            out, pull = torch.func.vjp(f, q, k, v)
            jacobian = torch.func.jacrev(f)(q, k, v)
            torch.testing.assert_close(
                torch.einsum("bhnd,bhndxyzw->xyzw", torch.ones_like(out), jacobian),
                pull(torch.ones_like(out))[0],
            )

    def test_forward_mode(self):
        """The formula, of the same weights; and a Hessian by forward over reverse mode."""
        q, k, v = (x.detach() for x in qkv(3))
        found, wanted = (torch.func.jvp(f, (q, k, v), (k, v, q)) for f in (dropped, expected))
        torch.testing.assert_close(found, wanted)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, k)
            tangent = forward_ad.unpack_dual(dropped(dual, k, v)).tangent
        torch.testing.assert_close(
            tangent, torch.func.jvp(lambda q: dropped(q, k, v), (q,), (k,))[1]
        )

        def value(attend):
            return lambda q: attend(q, k, v).sin().sum()

        one = torch.func.jacfwd(torch.func.jacrev(value(dropped)), randomness="same")(q)
        two = torch.func.jacrev(torch.func.jacrev(value(dropped)))(q)
        torch.testing.assert_close(one, two)

    def test_vmap_draws_as_it_is_told(self):
        x = [torch.stack([y.detach()] * 4) for y in qkv()]

        def run(randomness, f=lambda *x: dvf.attention(*x, dropout_p=P)):
            torch.manual_seed(3)
            return torch.vmap(f, randomness=randomness)(*x)

        same = run("same")
        assert torch.equal(same, dropped(*qkv()).detach().expand_as(same))
        different = run("different")
        assert not torch.equal(different[0], different[1])
        with pytest.raises(RuntimeError, match="randomness flag"):
            run("error")

        for y in x:
            y.requires_grad_()  # and autograd outside the map
        assert torch.equal(run("different"), different)
        for y in x:
            y.requires_grad_(False)

        def slope(q, k, v):
            return torch.func.grad(lambda q: dvf.attention(q, k, v, dropout_p=P).sin().sum())(q)

        o, dq = run("different"), run("different", slope)
        for i in range(4):  # those weights again, found from the output's own draw
            q, k, v = (y[i] for y in x)
            seeds = torch.manual_seed(3) and torch.randint(2**63 - 1, (4, 1))
            y = q.clone().requires_grad_()
            plain = reference.attention(y, k, v, seed=seeds[i], dropout_p=P)
            torch.testing.assert_close(o[i], plain)
            torch.testing.assert_close(dq[i], torch.autograd.grad(plain.sin().sum(), y)[0])

    def test_hessian_vector_products_by_reverse_mode_alone(self):
        """What differentiates a double backward in its direction and its cotangent: (50)-(52)."""
        q, k, v = (x.detach() for x in qkv())

        def value(attend):
            return lambda q, k, v: attend(q, k, v).sin().sum()

        for function in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
            found, wanted = (function(value(f), (q, k, v), (k, v, q)) for f in (dropped, expected))
            torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("part", ["gdo in do", "gq in do"])
    def test_the_derivative_of_a_double_backward(self, part):
        def second(attend):
            leaves = qkv()
            do = torch.ones_like(leaves[0]).requires_grad_()
            dq = torch.autograd.grad(attend(*leaves), leaves[0], do, create_graph=True)[0]
            along = leaves[1].detach().clone().requires_grad_()
            of = leaves[0] if part == "gq in do" else do
            g = torch.autograd.grad(dq.sin(), of, along, create_graph=True)[0]
            return torch.autograd.grad(g.sin().sum(), (along, do))

        torch.testing.assert_close(second(dropped), second(expected))


class TestSurroundings:
    def test_autocast(self):
        x = qkv(40, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            o = dropped(*x)
        assert o.dtype == torch.bfloat16
        torch.testing.assert_close(o, dropped(*(y.bfloat16() for y in x)))

    def test_checkpoint_restores_the_weights(self):
        def penalty(wrap):
            torch.manual_seed(1)
            x = qkv()
            o = wrap(lambda *x: dvf.attention(*x, dropout_p=P).sin())(*x)
            grads = torch.autograd.grad(o.sum(), x, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in grads), x)

        def recomputed(f):
            return lambda *x: checkpoint(f, *x, use_reentrant=False)

        torch.testing.assert_close(penalty(recomputed), penalty(lambda f: f), rtol=0, atol=0)

    @traces_gradients
    def test_compiled(self):
        """Inductor draws other numbers than the eager generator: judged by what is kept of the weights."""
        x = [y.detach() for y in qkv(6)]
        eye = torch.eye(6, dtype=torch.float64).expand(2, 3, 6, 6)

        @torch._dynamo.config.patch(trace_autograd_ops=True)
        @torch.compile(fullgraph=True)
        def step(q, k, v):
            o = dvf.attention(q, k, v, dropout_p=P)
            g = torch.autograd.grad(o.sin().sum(), (q, k, v), create_graph=True)
            second = torch.autograd.grad(sum(y.square().sum() for y in g), (q, k, v))
            return o.detach(), second

        q, k, v = (y.clone().requires_grad_() for y in (x[0], x[1], eye))
        o, found = step(q, k, v)
        kept = o != 0
        assert 0 < kept.sum() < kept.numel()
        plain = ((q @ k.mT / 2).softmax(-1) * kept / (1 - P)) @ v
        g = torch.autograd.grad(plain.sin().sum(), (q, k, v), create_graph=True)
        wanted = torch.autograd.grad(sum(y.square().sum() for y in g), (q, k, v))
        torch.testing.assert_close(o, plain.detach())
        torch.testing.assert_close(found, wanted)
        assert not torch.equal(step(q, k, v)[0], o)

    def test_on_the_reference_backend(self):
        x = qkv()
        with dvf.use_backend("reference"):
            found = WAYS["autograd.grad"](dropped, [y.detach() for y in x], TAILS["nonlinear"])
        wanted = WAYS["autograd.grad"](dropped, [y.detach() for y in x], TAILS["nonlinear"])
        torch.testing.assert_close(list(found), list(wanted))

    def test_leading_axes(self):
        """[H, N, d] is one sample, and broadcast leading axes count as samples in order."""
        q, k, v = (y.detach() for y in qkv())
        torch.testing.assert_close(dropped(q[0], k[0], v[0]), dropped(q, k, v)[0])
        stacked = [y.unflatten(0, (1, 2)) for y in (q, k, v)]
        assert torch.equal(dropped(*stacked)[0], dropped(q, k, v))

    def test_equals_pytorch_without_dropout_in_expectation_of_its_call(self):
        """The call of PyTorch's own function, argument by argument."""
        x = [y.detach() for y in qkv()]
        theirs = F.scaled_dot_product_attention(*x, None, 0.0, True)
        torch.testing.assert_close(dvf.attention(*x, None, 0.0, True), theirs)
