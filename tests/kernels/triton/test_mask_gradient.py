"""Gradients of additive masks: every way to broadcast one, and what is allocated for it."""

import itertools
from typing import Any

import pytest
import torch

from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import AttentionBackward, AttentionDoubleBackward
from tests.helpers.attention_cases import Case, all_orders, operands

triton = pytest.importorskip("diversevit_kernels.triton.attention")
triton_mask_gradient = pytest.importorskip("diversevit_kernels.triton.attention.mask_gradient")
allocation = pytest.importorskip("diversevit_kernels.triton.runtime.tensors")
chip = pytest.importorskip("diversevit_kernels.triton.runtime.device")
launch = pytest.importorskip("diversevit_kernels.triton.runtime.launch")

BROADCASTS = list(itertools.product((True, False), repeat=4))
"""Which axes of a mask [B, H, Nq, Nk] have size 1."""


def shape_of(broadcast, *full):
    return tuple(1 if one else n for one, n in zip(broadcast, full, strict=True))


def name_of(broadcast):
    return ",".join(
        "1" if one else axis for one, axis in zip(broadcast, ("B", "H", "Nq", "Nk"), strict=True)
    )


def orders(kernels, case, dtype, mask, device):
    """All orders for a mask in float64 that is rounded to ``dtype``."""
    q, k, v, _, causal = operands(case, torch.float64, device=device)
    return all_orders(
        kernels, case, (*(x.to(dtype) for x in (q, k, v)), mask.to(device, dtype), causal)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("broadcast", BROADCASTS, ids=name_of)
def test_every_broadcast_has_the_gradient_of_the_definition(broadcast, dropout, device):
    case = Case(B=2, H=4, Hkv=2, Nq=17, Nk=20, d=8, dv=8, dropout=dropout)
    mask = torch.randn(shape_of(broadcast, 2, 4, 17, 20), dtype=torch.float64)
    found = orders(triton, case, torch.float64, mask, device)
    expected = orders(reference, case, torch.float64, mask, device)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(1, 1, 17, 20), (1, 2, 1, 20)], ids=str)
def test_beside_a_causal_mask(shape, device):
    case = Case(B=2, H=2, Nq=17, Nk=20, d=8, dv=8, mask="causal")
    mask = torch.randn(shape, dtype=torch.float64)
    found = orders(triton, case, torch.float64, mask, device)
    expected = orders(reference, case, torch.float64, mask, device)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(1, 1, 17, 20), (1, 1, 1, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_taken_before_they_are_rounded(shape, dtype, device):
    """One rounding: the error is that of the float32 sums' rounding, and of the tiles', whatever shares the mask."""
    case = Case(B=12, H=1, Hkv=1, Nq=17, Nk=20, d=8, dv=8)
    q, k, v, _, causal = operands(case, dtype, device=device)
    mask = torch.randn(shape, device=device).to(dtype)
    ours = all_orders(triton, case, (q, k, v, mask, causal))
    eager = all_orders(reference, case, (q, k, v, mask, causal))
    exact = all_orders(reference, case, (*(x.double() for x in (q, k, v, mask)), causal))
    for at in (6, 11):  # dmask and gmask
        assert ours[at].shape == mask.shape
        # the reference's own sums are rounded once
        assert_within_budget(ours[at], eager[at], exact[at], terms=20 * 16 * 12 * 17)


def test_sums_are_the_same_on_every_run(device):
    case = Case(B=3, H=2, Nq=17, Nk=20, d=8, dv=8)
    mask = torch.randn(1, 2, 1, 20, dtype=torch.float64)
    one, other = (orders(triton, case, torch.float32, mask, device) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def both_orders(shape, like: Any, B, H, N, d) -> list[torch.Tensor]:
    """Run or record backward and double backward with such a mask; what was allocated, largest first."""
    q, k, v, o, do, dq, ddq, ddk, ddv = (like(B, H, N, d) for _ in range(9))
    mask, ddmask = like(*shape), like(*shape)
    softmax = like(B, H, 2, N)
    with allocation.allocations.collecting() as made:
        triton.attention_backward(
            AttentionBackward(q, k, v, mask, None, o, softmax, do, False, 0.5, 0.0, True)
        )
        triton.attention_double_backward(
            AttentionDoubleBackward(
                *(q, k, v, mask, None, o, softmax, do, dq, ddq, ddk, ddv, ddmask),
                *(False, 0.5, 0.0, True),
            )
        )
    return sorted(made, key=torch.Tensor.numel, reverse=True)


@pytest.mark.parametrize("broadcast", BROADCASTS, ids=name_of)
@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_nothing_quadratic_is_allocated_for_4097_tokens(broadcast, name, monkeypatch):
    """Nothing larger than the gradients themselves and the heads' rows."""
    monkeypatch.setattr(allocation, "allocator", torch.empty)  # no guards around meta tensors
    B, H, N, d = 2, 12, 4097, 64

    def like(*shape):
        return torch.empty(shape, device="meta")

    shape = shape_of(broadcast, B, H, N, N)
    with chip.pretend(name), launch.recording(run=False):
        made = both_orders(shape, like, B, H, N, d)
    gradients = [x for x in made if tuple(x.shape) == shape]
    others = [x for x in made if tuple(x.shape) != shape]
    assert len(gradients) == 2
    assert others[0].numel() <= B * H * N * d


@pytest.mark.parametrize("broadcast", BROADCASTS, ids=name_of)
def test_nothing_quadratic_is_allocated_for_a_run(broadcast, device):
    B, H, N, d = 1, 2, 35, 2

    def like(*shape):
        return torch.randn(shape).to(device)

    shape = shape_of(broadcast, B, H, N, N)
    made = both_orders(shape, like, B, H, N, d)
    assert sum(tuple(x.shape) == shape for x in made) == 2
    if chip.INTERPRETED:  # at most four programs share masks, with tiles of 16 x 16
        others = [x for x in made if tuple(x.shape) != shape]
        assert all(x.numel() <= 4 * 16 * 16 for x in others)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_parts_are_added_up(dtype, device, guarded):
    parts = guarded.place(torch.randn(9, 2, 3, 21, 37).to(device))
    out = guarded.empty(tuple(parts.shape[1:]), dtype=dtype, device=device)
    one = triton_mask_gradient.sum_into(out, parts)
    exact = parts.double().sum(0)
    torch.testing.assert_close(one, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
