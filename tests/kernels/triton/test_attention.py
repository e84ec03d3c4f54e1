"""The Triton attention kernels equal the definition, to second order, and write where they should."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import diversevit_fast as dvf
from diversevit_fast.ops import reference
from diversevit_kernels.common.contracts import AttentionBackward, AttentionDoubleBackward
from tests.helpers.attention_cases import (
    CASES,
    DROPOUT,
    DTYPES,
    MISTAKES,
    SEED,
    Case,
    Sabotaged,
    all_orders,
    any_case,
    as_function,
    check_contracts,
    check_orders,
    differentiable,
    operands,
)
from tests.helpers.second_order import TAILS, WAYS

triton = pytest.importorskip("diversevit_kernels.triton.attention")

allocation = pytest.importorskip("diversevit_kernels.triton.runtime.tensors")

MORE = {
    "many-tiles": Case(B=1, H=2, Nq=70, Nk=70, d=16, dv=16, layout="projection"),
    "ragged": Case(B=1, H=1, Hkv=1, Nq=33, Nk=50, d=8, dv=24),
    "head-per-program": Case(B=2, H=3, Hkv=3, Nq=37, Nk=53, d=8, dv=8),
    "all-keys-in-tile": Case(B=1, H=1, Hkv=1, Nq=40, Nk=31, d=8, dv=8),
    "few-queries": Case(B=2, H=2, Nq=16, Nk=53, d=16, dv=16),
    "split-width": Case(B=1, H=1, Hkv=1, Nq=20, Nk=35, d=80, dv=80),
    "causal-tiles": Case(B=2, H=2, Nq=50, Nk=70, d=8, dv=8, mask="causal"),
    "causal-more-queries-tiles": Case(B=1, H=2, Nq=70, Nk=40, d=8, dv=8, mask="causal"),
    "grouped-tiles": Case(B=2, H=4, Hkv=2, Nq=40, Nk=45, d=8, dv=8),
    "grouped-mask-tiles": Case(B=1, H=4, Hkv=2, Nq=20, Nk=45, d=8, dv=8, mask="additive"),
    "bool-tiles": Case(B=2, Nq=40, Nk=45, d=8, dv=8, mask="bool"),
    "empty-row-tiles": Case(B=1, Nq=40, Nk=45, d=8, dv=8, mask="empty-row"),
    "broadcast-tiles": Case(B=3, Nq=20, Nk=45, d=8, dv=8, mask="broadcast"),
    "no-dense-axis-tiles": Case(Nq=33, Nk=40, d=24, dv=40, layout="slice"),
    "scale-of-two-tiles": Case(B=1, H=1, Hkv=1, Nq=40, Nk=53, d=8, dv=24, scale=0.5),
    "scale-of-two-head": Case(B=2, H=3, Hkv=3, Nq=37, Nk=53, d=8, dv=8, scale=0.125),
    "scale-of-two-all-keys": Case(B=1, H=1, Hkv=1, Nq=40, Nk=31, d=8, dv=8, scale=2.0),
    "scale-of-two-few-queries": Case(B=2, H=2, Nq=16, Nk=53, d=16, dv=16, scale=0.25),
    "scale-of-two-grouped": Case(B=1, H=4, Hkv=2, Nq=40, Nk=45, d=8, dv=8, scale=0.5),
    "scale-of-two-causal": Case(B=1, Nq=50, Nk=70, d=8, dv=8, mask="causal", scale=0.5),
    "scale-of-two-bool": Case(B=2, Nq=40, Nk=45, d=8, dv=8, mask="bool", scale=0.5),
    "scale-of-two-empty-row": Case(B=1, Nq=40, Nk=45, d=8, dv=8, mask="empty-row", scale=0.5),
    "scale-of-two-additive": Case(B=1, Nq=40, Nk=45, d=8, dv=8, mask="shared", scale=0.5),
    "scale-below-zero": Case(B=1, Nq=40, Nk=45, d=8, dv=8, scale=-0.5),
    "scale-zero": Case(B=1, Nq=20, Nk=45, d=8, dv=8, scale=0.0),
}
WAYS_THROUGH = ("many-tiles", "head-per-program", "all-keys-in-tile", "few-queries", "split-width")
WAYS_THROUGH += ("causal-tiles", "grouped-mask-tiles", "bool-tiles", "scale-of-two-head")
DROPPED = {name: MORE[name]._replace(dropout=0.4) for name in WAYS_THROUGH}
ALL = {**CASES, **MORE, **{f"dropout-{k}": x for k, x in (DROPOUT | DROPPED).items()}}


@pytest.fixture(params=ALL.values(), ids=ALL.keys())
def case(request):
    return request.param


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rungs_within_budget(case, dtype, device, guarded):
    check_orders(triton, case, dtype, device=device, place=guarded.place)


@pytest.mark.parametrize("N", [197, 257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vit_sizes_within_budget(N, dtype, device):
    case = Case(H=1, Hkv=1, Nq=N, Nk=N, d=64, dv=64, layout="projection")
    check_orders(triton, case, dtype, device=device)


@pytest.mark.parametrize("d", [16, 32, 64, 80, 88, 96, 104, 112, 128, 256])
def test_head_widths(d, device):
    check_orders(triton, Case(H=1, Hkv=1, Nq=20, Nk=40, d=d, dv=d), torch.bfloat16, device=device)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=any_case(), dtype=st.sampled_from((*DTYPES, torch.float64)), seed=st.integers(0, 2**31))
def test_any_shape_within_budget(case, dtype, seed, device, guarded):
    case = case._replace(Nq=max(2, case.Nq)) if case.mask == "empty-row" else case
    check_orders(triton, case, dtype, seed=seed, device=device, place=guarded.place)


EVERY_ENTRY = ("one-query", "one-token", "more-queries")
"""Cases whose Jacobians are compared entry by entry; of others, random projections of them (minutes otherwise)."""


DERIVED = [*CASES, *(f"dropout-{name}" for name in ("one-query", "causal", "grouped-mask"))]


@pytest.mark.parametrize("name", DERIVED)
def test_first_and_second_derivative(name, device):
    case, fast = ALL[name], name not in EVERY_ENTRY
    q, k, v, mask, causal = operands(case, device=device)
    inputs = [x.detach().requires_grad_() for x in differentiable(q, k, v, mask)]
    with dvf.use_backend("triton"):
        assert gradcheck(as_function(case, mask, causal), inputs, fast_mode=fast)
        assert gradgradcheck(as_function(case, mask, causal), inputs, fast_mode=fast)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_contracts(dropout, kind, device, monkeypatch):
    monkeypatch.setattr(
        allocation, "allocator", torch.empty
    )  # a result between guards has an offset
    with dvf.use_backend("triton"):
        check_contracts(kind, device, dropout)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_twice(way, tail, device, recwarn):
    case = Case(B=1, Nq=20, Nk=35, d=3, dv=5)
    q, k, v, _, _ = operands(case, device=device)
    with dvf.use_backend("triton"):
        ours = WAYS[way](dvf.attention, (q, k, v), TAILS[tail])
    exact = WAYS["autograd.grad"](reference.attention, (q, k, v), TAILS[tail])
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def second_order(kernels, case, tensors, absent):
    """The double backward with some cotangents absent."""
    q, k, v, mask, causal = tensors
    g = torch.Generator().manual_seed(2)

    def like(x):
        return torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device, x.dtype)

    seed = torch.tensor([SEED], device=q.device) if case.dropout else None
    options = causal, 0.4, case.dropout
    o, softmax = kernels.attention_forward(q, k, v, mask, seed, *options)
    do = like(o)
    dd = {"ddq": like(q), "ddk": like(k), "ddv": like(v)}
    dq = kernels.attention_backward(
        AttentionBackward(q, k, v, mask, seed, o, softmax, do, *options, False)
    )[0]
    given = (None if name in absent else x for name, x in dd.items())
    return kernels.attention_double_backward(
        AttentionDoubleBackward(
            *(q, k, v, mask, seed, o, softmax, do, dq, *given, None),
            *(*options, False),
        )
    )[:4]


@pytest.mark.parametrize(
    "absent",
    [("ddq",), ("ddk",), ("ddv",), ("ddk", "ddv"), ("ddq", "ddv"), ("ddq", "ddk")],
    ids="+".join,
)
@pytest.mark.parametrize(
    "name", ["all-keys-in-tile", "many-tiles", "few-queries", "head-per-program", "grouped-tiles"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_absent_cotangents_are_zeros(dropout, name, absent, device):
    case = MORE[name]._replace(dropout=dropout)
    tensors = operands(case, device=device)
    ours = second_order(triton, case, tensors, absent)
    exact = second_order(reference, case, tensors, absent)
    for one, two in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("absent", [(), ("ddq",), ("ddq", "ddk")], ids=["none", "ddq", "ddq+ddk"])
@pytest.mark.parametrize(
    "name",
    ["all-keys-in-tile", "many-tiles", "few-queries", "grouped-mask-tiles", "head-per-program"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dq_that_was_not_kept_is_made_again(dropout, name, absent, device):
    case = MORE[name]._replace(dropout=dropout)
    tensors = operands(case, device=device)

    class Forgetful:
        """Kernels after a backward that kept nothing, as the CPU's."""

        attention_forward = triton.attention_forward
        attention_backward = staticmethod(
            lambda inputs: (None, *triton.attention_backward(inputs)[1:])
        )
        attention_double_backward = triton.attention_double_backward

    given, kept = (second_order(x, case, tensors, absent) for x in (Forgetful, triton))
    for one, two in zip(given, kept, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("first", ["cpu", "reference"])
def test_the_double_backward_after_another_backend(first, device):
    if device.type != first == "cpu":
        pytest.skip("the cpu backend takes CPU tensors")
    q, k, v, _, _ = operands(MORE["many-tiles"], device=device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    results = []
    for second in ("triton", "reference"):
        with dvf.use_backend(first):
            out = dvf.attention(*leaves).sin().sum()
            inner = torch.autograd.grad(out, leaves, create_graph=True)
        with dvf.use_backend(second):
            results.append(torch.autograd.grad(sum(x.square().sum() for x in inner), leaves))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["many-tiles", "head-per-program", "broadcast-tiles"])
def test_runs_give_the_same_bits(name, device):
    tensors = operands(MORE[name], torch.float32, device=device)
    for one, two in zip(*(all_orders(triton, MORE[name], tensors) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_oracle_bites(mistake, device):
    case = Case(Nq=17, Nk=33, d=8, dv=8)
    with pytest.raises(AssertionError):
        check_orders(Sabotaged(triton, mistake), case, torch.float32, device=device)


def test_the_guards_bite(device, guarded):
    """A store one element before a result, and one behind it, are seen."""
    for offset in (-1, 6):
        x = guarded.empty((2, 3), dtype=torch.float32, device=device)
        x.as_strided((1,), (1,), x.storage_offset() + offset).fill_(1.0)
        with pytest.raises(AssertionError, match="outside"):
            guarded.check()
        guarded.zones.clear()


@pytest.mark.overflow
@pytest.mark.parametrize("far", ["samples", "rows"])
def test_offsets_beyond_two_to_the_31(far, device):
    """Sample strides, or row strides inside a head, whose offsets overflow 32 bits."""
    case = Case(B=2, H=1, Hkv=1, Nq=20, Nk=20, d=16, dv=16, dropout=0.3)
    strides = (2**31 + 7, 16, 16, 1) if far == "samples" else (16, 16, 2**27 + 16, 1)
    span = 2**31 + 2**10 if far == "samples" else 20 * (2**27 + 16)
    plain = operands(case, torch.float16, device=device)
    room = torch.empty(span, dtype=torch.float16, device=device)  # touched where used, no more

    def spread(x):
        return room.as_strided(x.shape, strides).copy_(x)

    for place in (0, 1, 2):
        moved = [spread(x) if i == place else x for i, x in enumerate(plain[:3])]
        ours = all_orders(triton, case, (*moved, None, False))
        for one, two in zip(ours, all_orders(triton, case, plain), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.to(torch.float8_e4m3fn), "float8"),
        (lambda x: x.new_zeros(*x.shape[:-1], 257), "up to 256"),
    ],
    ids=["dtype", "width"],
)
def test_what_no_kernel_takes_is_refused_in_one_line(change, says, device):
    q, k, v, _, _ = operands(Case(), torch.float32, device=device)
    with pytest.raises(NotImplementedError, match=says) as refusal:
        triton.attention_forward(change(q), change(k), change(v), None, None, False, 1.0, 0.0)
    assert "\n" not in str(refusal.value)


def test_empty_batch(device):
    tensors = operands(Case(B=0, Nq=5, Nk=7), torch.float32, device=device)
    assert all(x.shape[0] == 0 for x in all_orders(triton, Case(B=0, Nq=5, Nk=7), tensors))
