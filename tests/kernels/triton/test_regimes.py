"""The Triton kernels in the regimes people train in: see ``tests/test_regimes.py``.

The interpreter says whether they compute the right thing, not how a chip's matrix instructions round.
"""

import itertools

import pytest
import torch

import diversevit_fast as dvf
from tests.helpers.regimes import assert_as_exact_as_eager, errors_over_eager, saturated
from tests.ops.test_regimes import check_masked_rows


@pytest.fixture(autouse=True)
def backend():
    with dvf.use_backend("triton"):
        yield


def problems(dtype, top, mask, d=16):
    """One query, few, and rows in several tiles; keys in one tile and in several."""
    sizes = ((1, 33), (16, 33), (40, 40), (40, 20))
    return (
        saturated(Nq, Nk, d, top, mask, seed, dtype)
        for (Nq, Nk), seed in itertools.product(sizes, range(2))
    )


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "trained mask"])
@pytest.mark.parametrize("top", [5, 30, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saturated(dtype, top, mask):
    ratios = errors_over_eager(dvf.attention, problems(dtype, top, mask))
    assert_as_exact_as_eager(ratios, 1.3, 4)


def test_saturated_whatever_the_scale():
    """1 / sqrt(24) is no power of two, as 1 / sqrt(16) is."""
    ratios = errors_over_eager(dvf.attention, problems(torch.float32, 100, False, d=24))
    assert_as_exact_as_eager(ratios, 1.3, 4)


@pytest.mark.parametrize("d", [16, 24], ids=["scale of two", "other scale"])
def test_one_key_with_all_the_weight_has_exactly_all_of_it(d):
    """Each query is one of the keys, all of one length: P is exactly 0 and 1, in the forward and in the backward."""
    k = torch.randn(1, 1, 40, d, generator=torch.Generator().manual_seed(0))
    k *= 60 / k.norm(dim=-1, keepdim=True)
    v = torch.randn(1, 1, 40, d).requires_grad_()
    o = dvf.attention(k, k, v)
    (dv,) = torch.autograd.grad(o, v, torch.ones_like(o))
    assert torch.equal(o, v)
    assert torch.equal(dv, torch.ones_like(v))


@pytest.mark.parametrize("trained", [False, True], ids=["mask", "trained mask"])
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 33), (16, 33), (40, 40), (40, 20)])
@pytest.mark.parametrize("rows", ["one row", "all rows"])
@pytest.mark.parametrize("value", [-1e9, None], ids=["-1e9", "least"])
def test_rows_masked_by_finite_numbers_are_uniform(value, rows, Nq, Nk, trained):
    check_masked_rows(dvf.attention, torch.float32, value, rows, Nq, Nk, trained)


@pytest.mark.parametrize("rows", ["one row", "all rows"])
def test_rows_masked_by_finite_numbers_are_uniform_in_bfloat16(rows):
    check_masked_rows(dvf.attention, torch.bfloat16, None, rows, 40, 40, True)
