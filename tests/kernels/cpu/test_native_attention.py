"""The C++ kernels of attention: within budget at every shape, same bits on any threads, no crash without a compiler."""

import shutil

import pytest
import torch

from diversevit_kernels.common.contracts import AttentionBackward, AttentionDoubleBackward
from diversevit_kernels.common.dropout import kept_by
from diversevit_kernels.cpu.attention import blocked
from diversevit_kernels.cpu.attention import dispatch as attention
from diversevit_kernels.cpu.attention import native as attention_native
from diversevit_kernels.cpu.runtime import compiler, cpp_library
from tests.helpers.attention_cases import (
    CASES,
    DROPOUT,
    SEED,
    Case,
    all_orders,
    check_orders,
    operands,
)
from tests.helpers.processes import in_a_process

BLOCKS = {
    "several blocks": Case(B=2, Nq=150, Nk=150, d=20, dv=20),
    "many keys": Case(H=1, Hkv=1, Nq=70, Nk=2100, d=16, dv=16),
    "deep": Case(H=1, Hkv=1, Nq=20, Nk=9, d=200, dv=136),
    "causal blocks": Case(H=4, Hkv=2, Nq=131, Nk=140, d=33, dv=17, mask="causal"),
    "masked blocks": Case(B=2, Nq=67, Nk=90, mask="bool"),
    "trained mask": Case(B=2, H=4, Hkv=2, Nq=67, Nk=90, mask="shared"),
}
ALL = {**CASES, **BLOCKS}
ALL |= {f"dropout, {name}": case._replace(dropout=0.2) for name, case in BLOCKS.items()}
ALL |= {f"dropout, {name}": case for name, case in DROPOUT.items()}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Rungs that ran natively."""
    if shutil.which(compiler.command()[0]) is None:
        pytest.skip("no C++ compiler")
    assert cpp_library.library("attention") is not None
    listed, call = [], attention_native.call

    def counted(direction, *args, **kwargs):
        listed.append(direction)
        return call(direction, *args, **kwargs)

    monkeypatch.setattr(attention_native, "call", counted)
    return listed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_within_budget(calls, name, dtype):
    check_orders(attention, ALL[name], dtype)
    assert calls == ["forward", "backward", "double_backward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget_on_lesser_processors(dtype, lesser_processor):
    assert lesser_processor("attention")
    for case in (*BLOCKS.values(), CASES["empty-row"], CASES["grouped-causal"]):
        check_orders(attention, case, dtype)
    check_orders(attention, ALL["dropout, causal blocks"], dtype)
    assert_drops_what_is_defined(dtype)


def assert_drops_what_is_defined(dtype, p=0.3, B=2, H=3, Nq=133, Nk=90):
    """Where all weights are equal and a value is a key's unit vector, the output shows what was kept."""
    q, k = torch.zeros(B, H, Nq, 4, dtype=dtype), torch.zeros(B, H, Nk, 4, dtype=dtype)
    v = torch.eye(Nk, dtype=dtype).expand(B, H, Nk, Nk)
    seed = torch.tensor([SEED])
    o, _ = attention.attention_forward(q, k, v, None, seed, False, 1.0, p)
    kept = kept_by(seed, (B, H, Nq, Nk), p)
    assert torch.equal(o != 0, kept)
    torch.testing.assert_close(o, kept.to(dtype) / (Nk * (1 - p)))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_weights_are_the_definition_s(dtype, native, monkeypatch):
    """In every tile, to the last bit of the pattern."""
    if not native:
        monkeypatch.setattr(attention_native, "supports", lambda q: False)
        monkeypatch.setattr(blocked, "TILE_BYTES", 5000)
    assert_drops_what_is_defined(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_weights_are_dropped_on_any_threads(dtype):
    case, before, found = ALL["dropout, causal blocks"], torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(all_orders(attention, case, operands(case, dtype)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mask", ["additive", "broadcast", "shared"])
def test_an_additive_mask_without_gradient(mask):
    """Asking for the mask's gradient changes no other's bits."""
    q, k, v, m, _ = operands(Case(B=2, Nq=40, Nk=23, mask=mask), torch.float32)
    m = m[(None,) * (4 - m.ndim)]
    o, softmax = attention.attention_forward(q, k, v, m, None, False, 0.4, 0.0)
    found = attention.attention_backward(
        AttentionBackward(q, k, v, m, None, o, softmax, o, False, 0.4, 0.0, False)
    )
    expect = attention.attention_backward(
        AttentionBackward(q, k, v, m, None, o, softmax, o, False, 0.4, 0.0, True)
    )
    assert found[3] is None
    assert expect[3].shape == m.shape
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expect[:3], strict=True))


SHAPES = [(b, h, i, j) for b in (1, 3) for h in (1, 4) for i in (1, 70) for j in (1, 85)]


def mask_gradients(mask, dtype, scale=0.4):
    """Gradients of a mask [B|1, H|1, Nq|1, Nk|1], and their double backward, of grouped heads."""
    q, k, v, _, _ = operands(Case(B=3, H=4, Hkv=2, Nq=70, Nk=85, d=5, dv=7), dtype)
    o, softmax = attention.attention_forward(q, k, v, mask, None, False, scale, 0.0)
    do, dd = torch.cos(o), [torch.sin(x) for x in (q, k, v, mask)]
    given = AttentionBackward(q, k, v, mask, None, o, softmax, do, False, scale, 0.0, True)
    first = attention.attention_backward(given)
    tensors = (q, k, v, mask, None, o, softmax, do, None, *dd)
    second = attention.attention_double_backward(
        AttentionDoubleBackward(*tensors, False, scale, 0.0, True)
    )
    return (*first, *second)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.4, 0.0, -0.3])
def test_gradients_of_masks_of_any_shape(shape, scale, monkeypatch):
    """Against the tiles of PyTorch's products; along the keys a constant changes no weight, so it is 0."""
    g = torch.Generator().manual_seed(1)
    mask = torch.randn(*shape, generator=g, dtype=torch.float64)
    ours = mask_gradients(mask, torch.float64, scale)
    assert ours[3].shape == ours[8].shape == mask.shape
    monkeypatch.setattr(attention_native, "supports", lambda *_: False)
    torch.testing.assert_close(ours, mask_gradients(mask, torch.float64, scale))


@pytest.mark.parametrize("shape", [(1, 1, 70, 85), (1, 4, 1, 85), (3, 1, 70, 85), (3, 4, 70, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_get_the_same_bits_on_any_threads(shape, dtype):
    g = torch.Generator().manual_seed(1)
    mask = torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            found.append(mask_gradients(mask, dtype))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_mask_that_is_nobodys_memory_but_its_own():
    """Overlapping strides, a dtype narrower than the arithmetic's, and a cotangent that is expanded."""
    q, k, v, _, _ = operands(Case(B=2, H=2, Nq=9, Nk=11), torch.float32)
    table = torch.randn(2 * 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = table.as_strided((1, 1, 9, 11), (0, 0, 1, 1))
    o, softmax = attention.attention_forward(q, k, v, mask, None, False, 0.4, 0.0)
    dd = torch.ones(()).expand(1, 1, 9, 11)
    tensors = (q, k, v, mask, None, o, softmax, torch.cos(o), None, None, None, None, dd)
    *_, found = attention.attention_double_backward(
        AttentionDoubleBackward(*tensors, False, 0.4, 0.0, True)
    )
    assert found.dtype == torch.bfloat16
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in tensors]
    wide[6] = attention.attention_forward(*wide[:5], False, 0.4, 0.0)[1]
    *_, exact = attention.attention_double_backward(
        AttentionDoubleBackward(*wide, False, 0.4, 0.0, True)
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("mask", ["causal", "bool", "additive", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_scale(mask, scale, dtype):
    q, k, v, m, is_causal = operands(Case(Nq=40, Nk=40, mask=mask), dtype)
    m = None if m is None else m[(None,) * (4 - m.ndim)]
    o, softmax = attention.attention_forward(q, k, v, m, None, is_causal, scale, 0.0)
    grads = attention.attention_backward(
        AttentionBackward(q, k, v, m, None, o, softmax, o, is_causal, scale, 0.0, False)
    )[:3]
    seen = torch.ones(40, 40, dtype=torch.bool).tril() if is_causal else m
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    seen = seen.double() if seen is not None and seen.is_floating_point() else seen
    expect = torch.nn.functional.scaled_dot_product_attention(*leaves, seen, scale=scale)
    limit = {torch.bfloat16: 0.05, torch.float16: 5e-3}.get(dtype, 1e-4)
    bound = {"atol": limit, "rtol": limit}
    torch.testing.assert_close(o.double(), expect.detach(), **bound)
    exact = torch.autograd.grad(expect, leaves, o.double())
    torch.testing.assert_close([g.double() for g in grads], list(exact), **bound)


GIVEN = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]


@pytest.mark.parametrize("given", GIVEN[1:], ids=str)
def test_absent_cotangents_are_zeros(given):
    q, k, v, _, _ = operands(Case(B=2, Nq=37, Nk=21, d=9, dv=5), torch.float64)
    o, softmax = attention.attention_forward(q, k, v, None, None, False, 0.4, 0.0)
    every = [torch.randn_like(x) for x in (q, k, v)]

    def second(dd):
        tensors = (q, k, v, None, None, o, softmax, torch.cos(o), None, *dd, None)
        return attention.attention_double_backward(
            AttentionDoubleBackward(*tensors, False, 0.4, 0.0, False)
        )[:4]

    some = second([x if one else None for x, one in zip(every, given, strict=True)])
    zeros = second([x if one else x * 0 for x, one in zip(every, given, strict=True)])
    torch.testing.assert_close(some, zeros)


def test_same_bits_on_any_threads():
    tensors = operands(BLOCKS["several blocks"], torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 64):
            torch.set_num_threads(threads)
            found.append(all_orders(attention, BLOCKS["several blocks"], tensors))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_rows_as_in_eager(value):
    q, k, v, _, _ = operands(Case(Nq=40, Nk=11, d=3, dv=3), torch.float32)
    q[0, 1, 5, 2] = value
    found, _ = attention.attention_forward(q, k, v, None, None, False, 0.4, 0.0)
    expect = torch.nn.functional.softmax(q @ k.mT * 0.4, -1) @ v
    torch.testing.assert_close(found, expect, equal_nan=True)


def test_no_samples():
    q, k, v = (torch.empty(0, 2, 5, 4) for _ in range(3))
    o, softmax = attention.attention_forward(q, k, v, None, None, False, 0.5, 0.0)
    assert (o.shape, softmax.shape) == ((0, 2, 5, 4), (0, 2, 2, 5))


CALL = """
import warnings, torch
from diversevit_kernels.cpu import attention
from diversevit_kernels.cpu.runtime import cpp_library
q, k, v = torch.linspace(-1, 1, 3 * 2 * 5 * 8).view(3, 1, 2, 5, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        o, _ = attention.attention_forward(q, k, v, None, None, False, 0.5, 0.0)
known = [str(w.message) for w in caught if "diversevit" in str(w.message)]
print(len(known), cpp_library.library("attention") is not None, f"{float(o.sum()):.3f}")
"""


def test_bad_and_good_machines(tmp_path):
    def run(**environment):
        return in_a_process(CALL, **{"DIVERSEVIT_CACHE_DIR": str(tmp_path / "kept"), **environment})

    both = [run(), run()]
    good = [one.communicate()[0].split() for one in both]
    assert good[0] == good[1]
    assert good[0][:2] == ["0", "True"]
    assert len(list((tmp_path / "kept").iterdir())) == 1  # two that compile at once: one file
    for bad in ({"CXX": "/nowhere/compiler"}, {"DIVERSEVIT_CACHE_DIR": "/dev/null/folder"}):
        assert run(**bad).communicate()[0].split() == ["1", "False", good[0][2]]
    assert run(DIVERSEVIT_COMPILE="0").communicate()[0].split() == ["0", "False", good[0][2]]
