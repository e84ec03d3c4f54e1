"""The work that is counted on a CPU is what the kernels' PyTorch paths multiply; C++ computes the same products."""

import itertools
from importlib import import_module

import pytest
import torch

from diversevit_fast.cost.counting import PRODUCTS, StepCounter
from diversevit_fast.ops import backends
from diversevit_fast.ops.work import _TAKES, order_of, work_of
from diversevit_kernels.common.contracts import (
    AttentionBackward,
    AttentionDoubleBackward,
    RoutedHeadPenaltyBackward,
    RoutedHeadPenaltyDoubleBackward,
)
from diversevit_kernels.common.contracts import HeadPenaltyBackward as PenaltyBackward
from diversevit_kernels.common.contracts import HeadPenaltyDoubleBackward as PenaltyDoubleBackward
from diversevit_kernels.cpu import attention, head_penalty
from diversevit_kernels.cpu.attention import native
from diversevit_kernels.cpu.attention import work as attention_work
from diversevit_kernels.cpu.head_penalty import work as penalty_work

B, H, N, D, E = 2, 3, 11, 8, 24


@pytest.fixture(autouse=True)
def pytorch_path(monkeypatch):
    monkeypatch.setattr(native, "library", lambda name: None)
    monkeypatch.setenv("DIVERSEVIT_COMPILE", "0")


def multiplied(function, *operands):
    counter = StepCounter()
    counter.phase = "forward"
    with counter:
        results = function(*operands)
    products = [n * call.flops for call, n in counter.calls.items() if call.kind == PRODUCTS]
    return sum(products), results


def attention_tensors(keys=N, width=D, values=D):
    q, k, v = (torch.randn(B, H, n, w) for n, w in ((N, width), (keys, width), (keys, values)))
    return q, k, v


@pytest.mark.parametrize("values", [D, 5])
def test_attention(values):
    q, k, v = attention_tensors(keys=7, values=values)
    options = (False, 0.3, 0.0)
    flops, (o, softmax) = multiplied(attention.attention_forward, q, k, v, None, None, *options)
    assert flops == attention_work.attention_forward(q, k, v, None, None, *options).products
    do = torch.randn_like(o)
    given = AttentionBackward(q, k, v, None, None, o, softmax, do, *options, False)
    flops, (dq, *_) = multiplied(attention.attention_backward, given)
    assert flops == attention_work.attention_backward(given).products
    for there in itertools.product((True, False), repeat=3):
        if not any(there[:2]):
            continue  # without ddS C++ multiplies a tile of zeros that PyTorch leaves out
        dd = [
            torch.randn_like(x) if is_there else None
            for x, is_there in zip((q, k, v), there, strict=True)
        ]
        saved = (q, k, v, None, None, o, softmax, do, dq, *dd, None)
        given = AttentionDoubleBackward(*saved, *options, False)
        flops, _ = multiplied(attention.attention_double_backward, given)
        assert flops == attention_work.attention_double_backward(given).products, there


def test_a_causal_mask_halves_the_pairs():
    q, k, v = attention_tensors()
    counts = [
        attention_work.attention_forward(q, k, v, None, None, causal, 1.0, 0.0).products
        for causal in (False, True)
    ]
    assert counts[1] / counts[0] == (N + 1) / (2 * N)


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_head_penalty(granularity):
    grads, kind = torch.randn(B, H, N, E), (granularity, "all", 1e-12)
    flops, (value, cosines, norms) = multiplied(head_penalty.head_penalty_forward, grads, *kind)
    assert flops == penalty_work.head_penalty_forward(grads, *kind).products
    given = PenaltyBackward(grads, cosines, norms, torch.ones_like(value), None, *kind)
    flops, dgrads = multiplied(head_penalty.head_penalty_backward, given)
    assert flops == penalty_work.head_penalty_backward(given).products
    saved = (grads, cosines, norms, torch.ones_like(value), None, torch.randn_like(dgrads))
    given = PenaltyDoubleBackward(*saved, *kind)
    flops, _ = multiplied(head_penalty.head_penalty_double_backward, given)
    assert flops == penalty_work.head_penalty_double_backward(given).products


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_routed_head_penalty(granularity):
    r, w = torch.randn(B, N, 3, H, D), torch.randn(3, H, D, E)
    kind, module = (granularity, "all", 1e-12), head_penalty
    flops, (value, *saved) = multiplied(module.routed_head_penalty_forward, r, w, *kind)
    assert flops == penalty_work.routed_head_penalty_forward(r, w, *kind).products
    given = RoutedHeadPenaltyBackward(r, w, *saved, torch.ones_like(value), None, *kind)
    flops, _ = multiplied(module.routed_head_penalty_backward, given)
    assert flops == penalty_work.routed_head_penalty_backward(given).products
    for there in ((True, True), (True, False), (False, True)):
        dd = [
            torch.randn_like(x) if is_there else None
            for x, is_there in zip((r, w), there, strict=True)
        ]
        given = (r, w, *saved, torch.ones_like(value), None, *dd)
        given = RoutedHeadPenaltyDoubleBackward(*given, *kind)
        flops, _ = multiplied(module.routed_head_penalty_double_backward, given)
        assert flops == penalty_work.routed_head_penalty_double_backward(given).products, there


def test_cpp_computes_half_of_a_gram_matrix(monkeypatch):
    """In blocks of 4 x 4 heads on and below the diagonal: of 12 heads 6 of 9 blocks."""
    r, w = torch.randn(B, N, 3, 12, D), torch.randn(3, 12, D, E)
    kind = ("token", "all", 1e-12)
    plain = penalty_work.routed_head_penalty_forward(r, w, *kind).products
    monkeypatch.setenv("DIVERSEVIT_COMPILE", "1")
    native = penalty_work.routed_head_penalty_forward(r, w, *kind).products
    assert plain - native == 2 * B * N * E * (144 - 96)


def test_names_and_orders():
    qkv = torch.randn(B, N, 3, H, D)
    packed = work_of("attention_qkvpacked", (qkv, None, False, 1.0, 0.0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    assert packed == work_of("attention", (q, k, v, None, None, False, 1.0, 0.0))
    first = work_of("attention_qkvpacked", (qkv, None, False, 1.0, 0.0, 1))
    assert first.products * N == packed.products
    names = ("gelu", "gelu_backward", "gelu_double_backward")
    assert [order_of(name) for name in names] == ["forward", "backward", "double backward"]


def functions_of(protocol):
    return [name for name in vars(protocol) if name.endswith(("forward", "backward"))]


@pytest.mark.parametrize("protocol", backends._FOLDERS, ids=lambda protocol: protocol.__name__)
def test_every_function_of_a_backend_says_what_it_asks_of_the_machine(protocol):
    """A new operator that is not counted would be free."""
    folder = backends._FOLDERS[protocol]
    work = import_module(f"diversevit_kernels.cpu.{folder}.work")
    functions = functions_of(protocol)
    assert len(functions) == 3
    for function in functions:
        assert backends.folder_of(function) == folder
        assert callable(getattr(work, function))
        assert function.endswith("_forward") or function in _TAKES


def test_a_function_of_nobody_is_named():
    with pytest.raises(LookupError, match="has softplus_forward"):
        backends.folder_of("softplus_forward")
