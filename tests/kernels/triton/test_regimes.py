"""The Triton kernels in the regimes people train in: see ``tests/test_regimes.py``.

The interpreter says whether they compute the right thing, not how a chip's matrix instructions round.
"""

import itertools

import pytest
import torch

import diversevit_fast as dvf
from tests.helpers.attention_cases import Case, all_orders, operands
from tests.helpers.regimes import assert_as_exact_as_eager, errors_over_eager, saturated
from tests.kernels.triton.conftest import INTERPRETED
from tests.ops.test_regimes import check_masked_rows

kernels = pytest.importorskip("diversevit_kernels.triton.attention")
from diversevit_kernels.triton.attention import configs  # noqa: E402
from diversevit_kernels.triton.runtime.plan import LaunchTable  # noqa: E402


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


@pytest.mark.parametrize("tables", ["own", "Hopper's"])
@pytest.mark.parametrize(
    ("H", "Hkv", "Nq"), [(4, 2, 3), (4, 1, 40), (2, 2, 40), (4, 4, 40), (2, 2, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_through_the_probability_of_a_single_key_are_exactly_zero(
    dtype, H, Hkv, Nq, tables, device, monkeypatch
):
    """It is 1 whatever its score: dq, dk, gq, gk and gv are differences of equal numbers, summed alike."""
    if tables == "Hopper's":
        for order in ("BACKWARD_ROWS", "DOUBLE_BACKWARD_ROWS", "DOUBLE_BACKWARD_HEAD"):
            monkeypatch.setattr(configs, f"{order}_ALL_KEYS", LaunchTable("none"))
    case = Case(H=H, Hkv=Hkv, Nq=Nq, Nk=1, d=16, dv=16)
    o, _, _, dq, dk, dv, gq, gk, gv, gdo = all_orders(
        kernels, case, operands(case, dtype, device=device)
    )
    for zero in (dq, dk, gq, gk, gv):  # a chip may sum a transposed product in another order
        assert zero.abs().max() <= (0 if INTERPRETED else 1e-6)
    for other in (o, dv, gdo):
        assert other.abs().min() > 0


@pytest.mark.parametrize("trained", [False, True], ids=["mask", "trained mask"])
@pytest.mark.parametrize(("Nq", "Nk"), [(1, 33), (16, 33), (40, 40), (40, 20)])
@pytest.mark.parametrize("rows", ["one row", "all rows"])
@pytest.mark.parametrize("value", [-1e9, None], ids=["-1e9", "least"])
def test_rows_masked_by_finite_numbers_are_uniform(value, rows, Nq, Nk, trained):
    check_masked_rows(dvf.attention, torch.float32, value, rows, Nq, Nk, trained)


@pytest.mark.parametrize("rows", ["one row", "all rows"])
def test_rows_masked_by_finite_numbers_are_uniform_in_bfloat16(rows):
    check_masked_rows(dvf.attention, torch.bfloat16, None, rows, 40, 40, True)
