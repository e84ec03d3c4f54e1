"""Attention equals its definition to second order, at any shape, layout, mask and dtype it accepts."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.ops import reference
from diversevit_kernels.cpu.attention import blocked
from diversevit_kernels.cpu.attention import dispatch as cpu
from tests.helpers.attention_cases import (
    CASES,
    DTYPES,
    MISTAKES,
    SHAPED,
    Case,
    Sabotaged,
    all_orders,
    any_case,
    as_function,
    check_contracts,
    check_orders,
    differentiable,
    operands,
    use_tiles,
)
from tests.helpers.second_order import TAILS, WAYS

ops = importlib.import_module("diversevit_fast.ops.attention")


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def test_first_and_second_derivative(case, tile):
    q, k, v, mask, causal = operands(case)
    inputs = [x.detach().requires_grad_() for x in differentiable(q, k, v, mask)]
    f = as_function(case, mask, causal)
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_equals_pytorch(case):
    q, k, v, mask, causal = operands(case)
    ours = dvf.attention(q, k, v, mask, is_causal=causal, enable_gqa=case.Hkv != case.H)
    theirs = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, enable_gqa=case.Hkv != case.H
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["plain", "one-query", "additive-broadcast", "grouped-causal"])
def test_every_way_of_asking_twice(name, way, tail, recwarn):
    case = CASES[name]
    q, k, v, mask, causal = operands(case)
    inputs = differentiable(q, k, v, mask)
    expect = WAYS["autograd.grad"](
        as_function(case, mask, causal, reference.attention), reshaped(inputs, case), TAILS[tail]
    )
    actual = WAYS[way](as_function(case, mask, causal), inputs, TAILS[tail])
    for ours, eager in zip(actual, expect, strict=True):
        torch.testing.assert_close(ours, eager.reshape(ours.shape), rtol=1e-10, atol=1e-10)


def reshaped(inputs, case):
    """The same inputs with the mask four-dimensional, as the reference takes it."""
    return [
        *inputs[:3],
        *(ops.mask_as_samples(m, (case.B, case.H), *SHAPED(case)) for m in inputs[3:]),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_within_budget(case, dtype, tile):
    check_orders(cpu, case, dtype)


@pytest.mark.parametrize("N", [197, 577])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vit_sizes_within_budget(N, dtype):
    check_orders(cpu, Case(H=1, Hkv=1, Nq=N, Nk=N, d=64, dv=64, layout="projection"), dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    any_case(),
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


@pytest.mark.parametrize("scale", [0.4, 1 / 3, 7.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key_has_no_gradient(dtype, scale):
    """A row with one key gives it the weight 1 whatever the score: dq, dk and what follows of them are exactly 0."""
    case = Case(B=2, H=3, Hkv=3, Nq=40, Nk=1, d=5, dv=3, scale=scale)
    q, k, v = ((3 * x).requires_grad_() for x in operands(case, dtype)[:3])
    out = ops.attention(q, k, v, scale=scale)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out), create_graph=True)
    assert torch.equal(out, v.expand_as(out))
    assert not dq.any()
    assert not dk.any()
    assert dv.all()
    gq, gk = torch.autograd.grad(dv.square().sum() + dq.sum(), (q, k))
    assert not gq.any()
    assert not gk.any()


def test_runs_give_the_same_bits():
    case = Case(B=3, H=4, Hkv=4, Nq=65, Nk=65, d=16, dv=16)
    for one, two in zip(
        *(all_orders(cpu, case, operands(case, torch.float32)) for _ in range(2)), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_bites(mistake):
    case = Case(Nq=17, Nk=33, d=8, dv=8)
    check_orders(cpu, case, torch.float32)
    with pytest.raises(AssertionError):
        check_orders(Sabotaged(cpu, mistake), case, torch.float32)


@pytest.mark.parametrize("dropped", ["ddS - eta", "Y", "P t", "dS ddK"])
def test_a_missing_term_of_the_double_backward_is_seen(dropped):
    """Equation (6)-(9) with one term left out differ from float64 autograd by far more than rounding."""
    q, k, v, _, _ = operands(CASES["plain"])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    do = torch.randn_like(q).requires_grad_()
    grads = torch.autograd.grad(reference.attention(*inputs), inputs, do, create_graph=True)
    a, b, c = (torch.randn_like(x) for x in grads)
    exact = torch.autograd.grad(grads, [*inputs, do], (a, b, c))
    with torch.no_grad():
        scale = q.shape[-1] ** -0.5
        p = (scale * q @ k.mT).softmax(-1)
        dp = do @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        x = scale * (a @ k.mT + q @ b.mT)
        mean = (p * x).sum(-1, keepdim=True) * (dropped != "ddS - eta")
        r = ds * (x - mean) + p * (do @ c.mT) * (dropped != "Y")
        r = r - p * r.sum(-1, keepdim=True) * (dropped != "P t")
        gq = scale * (r @ k + ds @ b * (dropped != "dS ddK"))
    assert (gq - exact[0]).abs().max() > 1e-3 * exact[0].abs().max()


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements any new tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_nothing_of_size_n_by_n(monkeypatch):
    """Forward, backward and double backward at N = 2048 stay far below one N x N matrix."""
    monkeypatch.setenv("DIVERSEVIT_COMPILE", "0")  # what the C++ kernel allocates is not seen here
    tensors = operands(Case(Nq=2048, Nk=2048, H=1, Hkv=1, d=4, dv=4), torch.float32)
    with _LargestTensor() as seen:
        all_orders(cpu, Case(), tensors)
    assert blocked.TILE_BYTES // 4 <= seen.elements < 2048**2 / 4


def test_saved_tensors_are_linear_in_tokens():
    q, k, v = (torch.randn(1, 2, 256, 4, requires_grad=True) for _ in range(3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = dvf.attention(q, k, v)
        inner = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
        sum(g.sum() for g in inner)
    assert saved
    assert max(x.numel() for x in saved) <= q.numel()


def test_the_backward_keeps_none_of_its_results():
    """A CPU's double backward reads none of them."""
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    out = dvf.attention(q, k, v).square().sum()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        results = torch.autograd.grad(out, (q, k, v), create_graph=True)
    kept = {x.untyped_storage().data_ptr() for x in saved}
    assert not kept & {x.untyped_storage().data_ptr() for x in results}


class TestFunctorch:
    """torch.func and forward mode agree with the definition, or raise."""

    @pytest.fixture
    def qkv(self):
        return operands(Case())[:3]

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, q, k, v: torch.func.jacrev(f)(q, k, v),
            lambda f, q, k, v: torch.func.jacrev(torch.func.jacrev(lambda *x: f(*x).sin().sum()))(
                q, k, v
            ),
            lambda f, q, k, v: torch.func.jvp(lambda q: f(q, k, v), (q,), (k,))[1],
            lambda f, q, k, v: torch.func.hessian(lambda *x: f(*x).sin().sum())(q, k, v),
            lambda f, q, k, v: torch.func.vjp(f, q, k, v)[1](v)[1],
            lambda f, q, k, v: torch.func.vmap(f, in_dims=(0, None, 0))(q[:, None], k, v[:, None]),
        ],
        ids=["jacrev", "jacrev twice", "jvp", "hessian", "vjp", "vmap"],
    )
    def test_transform(self, transform, qkv):
        torch.testing.assert_close(
            transform(dvf.attention, *qkv),
            transform(reference.attention, *qkv),
            rtol=1e-9,
            atol=1e-9,
        )

    @pytest.mark.parametrize("batch", [1, 2])
    def test_per_sample_gradients_with_a_mask(self, batch):
        q, k, v, _, _ = operands(Case(B=3))
        mask = torch.randn(batch, 2, 4, 4, dtype=torch.float64)

        def gradient(f):
            def loss(q, k, v, m):
                return f(q[None].expand(batch, -1, -1, -1), k[None], v[None], m).sin().sum()

            return torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), (0, 0, 0, None))(
                q, k, v, mask
            )

        torch.testing.assert_close(gradient(dvf.attention), gradient(self.broadcast_reference))

    @staticmethod
    def broadcast_reference(q, k, v, m):
        k, v = (x.expand(len(q), *x.shape[1:]) for x in (k, v))
        return reference.attention(q, k, v, m)

    def test_batched_cotangents(self, qkv):
        q, k, v = (x.requires_grad_() for x in qkv)
        basis = torch.eye(q.numel(), dtype=q.dtype).view(-1, *q.shape)
        ours, plain = (
            torch.autograd.grad(f(q, k, v), q, basis, is_grads_batched=True)[0]
            for f in (dvf.attention, reference.attention)
        )
        torch.testing.assert_close(ours, plain)

    def test_forward_mode_over_a_recorded_backward_refuses(self, qkv):
        q, k, v = (x.requires_grad_() for x in qkv)
        out = dvf.attention(q, k, v)
        with forward_ad.dual_level():
            tangent = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
            with pytest.raises(UnsupportedError, match="forward-mode"):
                torch.autograd.grad(out, q, tangent)


def test_third_derivative_refuses():
    q, k, v = (x.requires_grad_() for x in operands(CASES["plain"])[:3])
    grad = torch.autograd.grad
    first = grad(dvf.attention(q, k, v).square().sum(), q, create_graph=True)[0]
    second = grad(first.square().sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="twice"):
        grad(second.sum(), q)


def test_compiled_forward_with_an_outer_second_derivative_raises():
    """A compiled region has no double backward: PyTorch must say so, whichever way one asks."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: dvf.attention(*x), backend="aot_eager", fullgraph=True)
    for way in ("autograd.grad", "backward", "backward(inputs=)"):
        with pytest.raises(RuntimeError, match=r"double backward|donated buffers"):
            WAYS[way](compiled, operands(CASES["plain"])[:3], TAILS["linear"])


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_contracts(kind):
    check_contracts(kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_pytorchs(dtype):
    q, k, v = (x.float().requires_grad_() for x in operands(Case(Nq=9, Nk=9, d=8, dv=8))[:3])
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = dvf.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
        inner = torch.autograd.grad(ours.sum(), (q, k, v), create_graph=True)
        sum(g.square().sum() for g in inner).backward()
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    inner = torch.autograd.grad(dvf.attention(*low).sum(), low, create_graph=True)
    expect = torch.autograd.grad(sum(g.float().square().sum() for g in inner), low)
    for x, want in zip((q, k, v), expect, strict=True):
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad, want.float(), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 1, 2, 5, 3)], ids=str)
def test_leading_axes_as_pytorch(shape):
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    mask = torch.randn((*shape[:-2], 5, 5), dtype=torch.float64)
    torch.testing.assert_close(
        dvf.attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    )


def test_broadcast_keys_get_summed_gradients():
    q = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    k, v = (torch.randn(1, 1, 6, 5, dtype=torch.float64) for _ in range(2))
    assert gradgradcheck(dvf.attention, [x.requires_grad_() for x in (q[:1], k, v)])
    torch.testing.assert_close(
        dvf.attention(q, k, v), dvf.attention(q, k.expand(3, 2, 6, 5), v.expand(3, 2, 6, 5))
    )


def test_empty_batch():
    q = torch.randn(0, 2, 4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(dvf.attention(q, q, q).sum(), q)
    assert grad.shape == q.shape


def test_masked_keys_receive_nothing():
    """A law: keys that the mask hides have zero gradient, to second order."""
    q, k, v, _, _ = operands(CASES["plain"])
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:, 2] = False
    gq, gk, gv = WAYS["backward"](lambda *x: dvf.attention(*x, mask), (q, k, v), TAILS["nonlinear"])
    assert not gk[:, :, 2].any()
    assert not gv[:, :, 2].any()
    assert gq.any()


@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_backends_agree(name):
    q, k, v = operands(CASES["plain"])[:3]
    with dvf.use_backend(name):
        actual = WAYS["backward"](dvf.attention, (q, k, v), TAILS["nonlinear"])
    expect = WAYS["backward"](reference.attention, (q, k, v), TAILS["nonlinear"])
    torch.testing.assert_close(actual, expect)


@pytest.mark.parametrize("order", [("reference", "cpu"), ("cpu", "reference")], ids=str)
def test_the_double_backward_may_run_on_another_backend(order):
    """One backend keeps what any other needs."""
    q, k, v, _, _ = operands(CASES["qkv-projection"])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with dvf.use_backend(order[0]):
        inner = torch.autograd.grad(dvf.attention(*leaves).sin().sum(), leaves, create_graph=True)
    with dvf.use_backend(order[1]):
        ours = torch.autograd.grad(sum(x.square().sum() for x in inner), leaves)
    inner = torch.autograd.grad(reference.attention(*leaves).sin().sum(), leaves, create_graph=True)
    exact = torch.autograd.grad(sum(x.square().sum() for x in inner), leaves)
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


BAD = {
    "not a tensor": (lambda q, k, v: (q.tolist(), k, v), {}, "q: expected a tensor, got list"),
    "integer": (lambda q, k, v: (q.long(), k, v), {}, "q: expected a floating dtype"),
    "sparse": (lambda q, k, v: (q, k.to_sparse(), v), {}, "k: expected a dense strided tensor"),
    "width": (lambda q, k, v: (q, k[..., :1], v), {}, "k: expected shape"),
    "tokens": (lambda q, k, v: (q, k, v[:, :, :2]), {}, "v: expected shape"),
    "no keys": (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), {}, "k: expected shape"),
    "batch": (lambda q, k, v: (q, k.repeat(2, 1, 1, 1), v), {}, "q, k, v: expected leading axes"),
    "dtype": (lambda q, k, v: (q, k.float(), v), {}, "k: expected dtype torch.float64 like q"),
    "device": (lambda q, k, v: (q, k.to("meta"), v), {}, "k: expected device cpu like q"),
    "groups": (
        lambda q, k, v: (q, k[:, :1].repeat(1, 3, 1, 1), v),
        {"enable_gqa": True},
        "k: expected shape a head count",
    ),
    "dropout range": (lambda *x: x, {"dropout_p": 1.5}, "dropout_p: expected a probability"),
    "scale": (lambda *x: x, {"scale": float("nan")}, "scale: expected a finite number"),
    "mask shape": (lambda *x: x, {"attn_mask": torch.ones(3, 4)}, "attn_mask: expected shape"),
    "mask dtype": (
        lambda *x: x,
        {"attn_mask": torch.ones(4, 4).long()},
        "attn_mask: expected torch.bool or a float",
    ),
    "causal and mask": (
        lambda *x: x,
        {"attn_mask": torch.ones(4, 4).bool(), "is_causal": True},
        "attn_mask: expected None",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    change, options, message = BAD[name]
    with pytest.raises(UsageError) as failure:
        dvf.attention(*change(*operands(CASES["plain"])[:3]), **options)
    assert str(failure.value).startswith(message), failure.value
    assert "\n" not in str(failure.value)
    assert "; " in str(failure.value)


def test_unknown_and_unavailable_backends_raise():
    with (
        pytest.raises(UsageError, match="use_backend: expected one of auto"),
        dvf.use_backend("gpu"),
    ):
        pass
    with (
        pytest.raises(UnsupportedError, match="'triton' is unavailable"),
        dvf.use_backend("triton"),
    ):
        pass
