"""An operator's host code allocates and launches, nothing else: these two, recorded, are all that it does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diversevit_kernels.common import contracts
from tests.helpers.layouts import LAYOUTS

launching = pytest.importorskip("diversevit_kernels.triton.runtime.launch")
from diversevit_kernels.triton import attention, gelu, head_penalty, layer_norm  # noqa: E402
from diversevit_kernels.triton.head_penalty import routed  # noqa: E402
from diversevit_kernels.triton.layer_norm import kernels as layer_norm_kernels  # noqa: E402
from diversevit_kernels.triton.runtime import copies, tensors  # noqa: E402


class Calls(TorchDispatchMode):
    """The calls to PyTorch inside the block that are neither an allocation nor a view."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(x.alias_info for x in func._schema.returns) and not func._schema.is_mutable
        of_tensors = "Tensor" in str(func._schema)
        if of_tensors and "empty" not in func._schema.name and not view:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def gelus(kind):
    x, dy, ddx = (LAYOUTS[kind](torch.randn(3, 5, 4)) for _ in range(3))
    yield gelu.gelu_forward, x, "none"
    yield gelu.gelu_backward, contracts.GeluBackward(x, dy, "none")
    yield gelu.gelu_double_backward, contracts.GeluDoubleBackward(x, dy, ddx, "none")


def layer_norms(kind, shape=(3, 5, 2, 4)):
    x, dy, ddx = (LAYOUTS[kind](torch.randn(shape)) for _ in range(3))
    w, b = (torch.randn(shape[:1:-1]).mT for _ in range(2))
    mean, rstd = torch.randn(2, *shape[:2])
    first = x, w, mean, rstd, dy
    yield layer_norm.layer_norm_forward, x, w, b, 2, 1e-5
    yield layer_norm.layer_norm_backward, contracts.LayerNormBackward(*first, 2, True, True)
    for dd in ((ddx, w, b), (ddx, None, None), (None, None, b), (None, None, None)):
        second = contracts.LayerNormDoubleBackward(*first, *dd, 2, True)
        yield layer_norm.layer_norm_double_backward, second


def empty_layer_norms(kind):
    yield from layer_norms("dense", {"rows": (0, 5, 2, 4), "features": (3, 5, 2, 0)}[kind])


def attentions(mask_kind, B=2, H=2, Nq=20, Nk=19, d=4):
    """All orders with a kind of mask, few queries or dropout; softmax statistics that are not dense."""
    dtype = torch.float64 if mask_kind == "bool in float64" else torch.float32
    Nq = 3 if mask_kind.startswith("few queries") else Nq
    seed, p = (torch.tensor([5]), 0.3) if "dropout" in mask_kind else (None, 0.0)
    q, k, v = (torch.randn(B, n, H, d, dtype=dtype).transpose(1, 2) for n in (Nq, Nk, Nk))
    mask = {
        "bool in float64": torch.ones(1, 1, Nq, Nk, dtype=torch.bool),
        "bool": torch.ones(B, 1, 1, Nk, dtype=torch.bool),
        "one number a key": torch.randn(1, H, 1, Nk),
        "half": torch.randn(B, H, Nq, Nk).bfloat16(),
    }.get(mask_kind)
    if mask_kind == "half":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    grad = mask is not None and mask.dtype != torch.bool
    softmax = torch.randn(B, H, Nq, 2, dtype=torch.promote_types(q.dtype, torch.float32)).mT
    first = q, k, v, mask, seed, q, softmax, q
    dds = q, k, v, mask if grad else None
    yield attention.attention_forward, q, k, v, mask, seed, False, 0.5, p
    after = False, 0.5, p, grad
    yield attention.attention_backward, contracts.AttentionBackward(*first, *after)
    for dq in (q, None):
        second = contracts.AttentionDoubleBackward(*first, dq, *dds, *after)
        yield attention.attention_double_backward, second


def penalty_operands(granularity):
    """Cosines, norms, cotangents of penalty and cosines (as a sum has it), and the rest: 5 tokens, 3 heads."""
    shape = (2, 5) if granularity == "token" else (2,)
    one = torch.ones(())
    statistics = torch.randn(*shape, 3, 3), torch.rand(*shape, 3), one, one.expand(*shape, 3, 3)
    return statistics, (granularity, "all", 1e-12)


def head_penalties(granularity):
    statistics, kind = penalty_operands(granularity)
    x, ddx = torch.randn(2, 3, 5, 7), torch.randn(2, 5, 3, 7).transpose(1, 2)
    first = contracts.HeadPenaltyBackward(x, *statistics, *kind)
    second = contracts.HeadPenaltyDoubleBackward(x, *statistics, ddx, *kind)
    yield head_penalty.head_penalty_forward, x, *kind
    yield head_penalty.head_penalty_backward, first
    yield head_penalty.head_penalty_double_backward, second


def routed_penalties(granularity):
    statistics, kind = penalty_operands(granularity)
    r, ddr, w, ddw = *torch.randn(2, 2, 5, 3, 3, 4), *torch.randn(2, 3, 3, 4, 7)
    first = contracts.RoutedHeadPenaltyBackward(r, w, *statistics, *kind)
    second = contracts.RoutedHeadPenaltyDoubleBackward(r, w, *statistics, ddr, ddw, *kind)
    yield head_penalty.routed_head_penalty_forward, r, w, *kind
    yield head_penalty.routed_head_penalty_backward, first
    yield head_penalty.routed_head_penalty_double_backward, second


def calls_of(operator, kind, patch):
    """Calls to PyTorch by all orders of an operator, and its launches."""
    patch.setattr(tensors, "allocator", torch.empty)
    calls = list(operator(kind))
    with launching.recording(run=False) as launches, Calls() as found:
        for function, *args in calls:
            function(*args)
    return found.names, launches


OPERATORS = [(f, kind) for f in (gelus, layer_norms) for kind in LAYOUTS]
OPERATORS += [(empty_layer_norms, kind) for kind in ("rows", "features")]
MASKS = ("none", "few queries", "bool", "bool in float64", "one number a key", "half")
MASKS += ("dropout", "few queries, dropout")
OPERATORS += [(attentions, kind) for kind in MASKS]
OPERATORS += [(f, g) for f in (head_penalties, routed_penalties) for g in ("token", "sample")]


@pytest.mark.parametrize(("operator", "kind"), OPERATORS, ids=lambda x: getattr(x, "__name__", x))
def test_nothing_but_allocations_and_launches(operator, kind, monkeypatch):
    monkeypatch.setattr(routed, "SCRATCH_BYTES", 4 * 4 * 3 * 3 * 7)  # several tiles of tokens
    names, launches = calls_of(operator, kind, monkeypatch)
    assert launches
    assert not names


def test_another_call_is_seen(monkeypatch):
    monkeypatch.setattr(
        layer_norm_kernels, "dense", lambda x: None if x is None else x.contiguous()
    )
    assert set(calls_of(layer_norms, "dense", monkeypatch)[0]) == {"aten::clone"}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_copy_is_dense_and_equal(kind, dtype, device, guarded):
    x = guarded.place(LAYOUTS[kind](torch.randn(3, 5, 13).to(device, dtype)))
    copy = copies.dense(x)
    assert copy is not None
    assert copy.is_contiguous()
    assert torch.equal(copy, x)
    assert (copy is x) == x.is_contiguous()


def test_what_is_written_broadcasts(device):
    y, row = torch.empty(3, 5, 7, device=device), torch.randn(7, device=device)
    assert torch.equal(copies.write(y, row), row.expand(3, 5, 7))
    assert torch.equal(copies.write(y, 0.0), torch.zeros_like(y))
    assert copies.write(y, torch.nan).isnan().all()
    assert copies.write(y[:0], 0.0).shape == (0, 5, 7)
