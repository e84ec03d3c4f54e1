"""The penalties with products as an H100 rounds them, emulated: TF32 cuts both operands off to 11 bits.

The interpreter's own products are exact, so it does not see a product whose operands were too coarse.
"""

import numpy as np
import pytest
import torch

from tests.kernels.triton.conftest import INTERPRETED
from tests.kernels.triton.test_head_penalty import On, _NoGuards
from tests.kernels.triton.test_routed_head_penalty import CASES, SOME_KINDS, check_results

gram = pytest.importorskip("diversevit_kernels.triton.head_penalty.gram")
from diversevit_kernels.triton.head_penalty import routed, routed_products  # noqa: E402
from diversevit_kernels.triton.runtime import device as devices  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU rounds by itself")
exact_dot, precision = gram.dot, devices.precision


def cut_off(x):
    """A float32 tile of the interpreter without the bits that TF32 lacks."""
    bits = np.ascontiguousarray(x.handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
    cut = x + 0.0
    cut.handle.data = bits.view(np.float32)
    return cut


def dot(a, b, acc, PRECISION):
    """``tiles.dot``, one TF32 product where that is asked for; three of them, or six of bfloat16, are exact."""
    if str(getattr(PRECISION, "value", PRECISION)) == "tf32":
        a, b = cut_off(a), cut_off(b)
    return exact_dot(a, b, acc, "ieee")


@pytest.fixture
def hopper(monkeypatch):
    """Precisions that an H100 is asked for, and its TF32; the interpreter's tiles."""

    def of_hopper(*args):
        with devices.pretend("sm_90"):
            return precision(*args)

    for module in (gram, routed_products):
        monkeypatch.setattr(module, "dot", dot)
        monkeypatch.setattr(module, "precision", of_hopper)


def check(case, dtype, kind):
    check_results(On(routed, torch.device("cpu"), _NoGuards()), case, dtype, kind)


@pytest.mark.parametrize("kind", SOME_KINDS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["plain", "clamped", "class-token"])
def test_results_within_budget(name, dtype, kind, hopper):
    check(CASES[name], dtype, kind)


def test_one_product_is_too_coarse_for_float16(hopper, monkeypatch):
    """What TF32 leaves of an H x H matrix and of gradients is no more than float16 has."""
    monkeypatch.setattr(gram, "mixed", _mixed_coarsely)
    check(CASES["class-token"], torch.bfloat16, SOME_KINDS[0])
    with pytest.raises(AssertionError, match="exceeds budget"):
        check(CASES["class-token"], torch.float16, SOME_KINDS[0])


def _mixed_coarsely(m, x, const):
    return exact_dot(
        cut_off(m), cut_off(x.to(const.ACC)), gram.tl.zeros_like(x).to(const.ACC), "ieee"
    )
