"""The C++ kernels of attention: within budget at every shape, same bits on any threads, no crash without a compiler."""

import shutil

import pytest
import torch

from diversevit_kernels.common.contracts import AttentionBackward, AttentionDoubleBackward
from diversevit_kernels.cpu.attention import dispatch as attention
from diversevit_kernels.cpu.attention import native as attention_native
from diversevit_kernels.cpu.runtime import compiler, cpp_library
from tests.helpers.attention_cases import CASES, Case, all_orders, check_orders, operands
from tests.helpers.processes import in_a_process

BLOCKS = {
    "several blocks": Case(B=2, Nq=150, Nk=150, d=20, dv=20),
    "many keys": Case(H=1, Hkv=1, Nq=70, Nk=2100, d=16, dv=16),
    "deep": Case(H=1, Hkv=1, Nq=20, Nk=9, d=200, dv=136),
    "causal blocks": Case(H=4, Hkv=2, Nq=131, Nk=140, d=33, dv=17, mask="causal"),
    "masked blocks": Case(B=2, Nq=67, Nk=90, mask="bool"),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


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
@pytest.mark.parametrize("name", [*CASES, *BLOCKS])
def test_within_budget(calls, name, dtype):
    case = {**CASES, **BLOCKS}[name]
    check_orders(attention, case, dtype)
    masked = case.mask in ("additive", "broadcast", "shared")  # their gradient is the tiles' work
    assert calls == ["forward"] if masked else ["forward", "backward", "double_backward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget_on_lesser_processors(dtype, lesser_processor):
    assert lesser_processor("attention")
    for case in (*BLOCKS.values(), CASES["empty-row"], CASES["grouped-causal"]):
        check_orders(attention, case, dtype)


@pytest.mark.parametrize("mask", ["additive", "broadcast", "shared"])
def test_an_additive_mask_without_gradient(calls, mask):
    q, k, v, m, _ = operands(Case(B=2, Nq=40, Nk=23, mask=mask), torch.float32)
    m = m[(None,) * (4 - m.ndim)]
    o, softmax = attention.attention_forward(q, k, v, m, False, 0.4)
    found = attention.attention_backward(
        AttentionBackward(q, k, v, m, o, softmax, o, False, 0.4, False)
    )
    expect = attention.attention_backward(
        AttentionBackward(q, k, v, m, o, softmax, o, False, 0.4, True)
    )
    assert calls == ["forward", "backward"]
    torch.testing.assert_close(found[:3], expect[:3])


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("mask", ["causal", "bool", "additive", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_scale(mask, scale, dtype):
    q, k, v, m, is_causal = operands(Case(Nq=40, Nk=40, mask=mask), dtype)
    m = None if m is None else m[(None,) * (4 - m.ndim)]
    o, softmax = attention.attention_forward(q, k, v, m, is_causal, scale)
    grads = attention.attention_backward(
        AttentionBackward(q, k, v, m, o, softmax, o, is_causal, scale, False)
    )[:3]
    seen = torch.ones(40, 40, dtype=torch.bool).tril() if is_causal else m
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    seen = seen.double() if seen is not None and seen.is_floating_point() else seen
    expect = torch.nn.functional.scaled_dot_product_attention(*leaves, seen, scale=scale)
    bound = (
        {"atol": 0.05, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    )
    torch.testing.assert_close(o.double(), expect.detach(), **bound)
    exact = torch.autograd.grad(expect, leaves, o.double())
    torch.testing.assert_close([g.double() for g in grads], list(exact), **bound)


GIVEN = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]


@pytest.mark.parametrize("given", GIVEN[1:], ids=str)
def test_absent_cotangents_are_zeros(given):
    q, k, v, _, _ = operands(Case(B=2, Nq=37, Nk=21, d=9, dv=5), torch.float64)
    o, softmax = attention.attention_forward(q, k, v, None, False, 0.4)
    every = [torch.randn_like(x) for x in (q, k, v)]

    def second(dd):
        tensors = (q, k, v, None, o, softmax, torch.cos(o), None, *dd, None)
        return attention.attention_double_backward(
            AttentionDoubleBackward(*tensors, False, 0.4, False)
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
    found, _ = attention.attention_forward(q, k, v, None, False, 0.4)
    expect = torch.nn.functional.softmax(q @ k.mT * 0.4, -1) @ v
    torch.testing.assert_close(found, expect, equal_nan=True)


def test_no_samples():
    q, k, v = (torch.empty(0, 2, 5, 4) for _ in range(3))
    o, softmax = attention.attention_forward(q, k, v, None, False, 0.5)
    assert (o.shape, softmax.shape) == ((0, 2, 5, 4), (0, 2, 2, 5))


CALL = """
import warnings, torch
from diversevit_kernels.cpu import attention
from diversevit_kernels.cpu.runtime import cpp_library
q, k, v = torch.linspace(-1, 1, 3 * 2 * 5 * 8).view(3, 1, 2, 5, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        o, _ = attention.attention_forward(q, k, v, None, False, 0.5)
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
