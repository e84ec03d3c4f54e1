"""The measures against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diversevit_fast.errors import UsageError
from diversevit_fast.probes.attributes import balancing_weights, combinations
from diversevit_fast.probes.measures import (
    agreement,
    attention_mass,
    halves,
    linear_cka,
    patch_shares,
    prevalence,
)
from diversevit_fast.probes.regions import draw_donors


def hsic(a, b):
    """Of two n x n kernel matrices, centred (arXiv 1905.00414, equation 3), up to a factor."""
    n = len(a)
    centre = torch.eye(n, dtype=a.dtype) - 1 / n
    return (a @ centre @ b @ centre).trace()


@given(st.integers(3, 12), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_linear_cka_is_its_definition(n, H, d, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, H, d, generator=g, dtype=torch.float64) + 3
    found = linear_cka(x)
    kernels = [x[:, h] @ x[:, h].T for h in range(H)]
    for i in range(H):
        for j in range(H):
            product = hsic(kernels[i], kernels[j])
            norms = hsic(kernels[i], kernels[i]) * hsic(kernels[j], kernels[j])
            torch.testing.assert_close(found[i, j], product / norms.sqrt())


def test_linear_cka_knows_no_rotation_scale_or_shift():
    x = torch.randn(20, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    found = linear_cka(torch.stack([x, 3 * x @ rotation + 5, torch.ones_like(x) * 0.1], 1))
    torch.testing.assert_close(found[:2, :2], torch.ones(2, 2, dtype=torch.float64))
    assert found[2].isnan().all()
    assert found[:, 2].isnan().all()
    assert not linear_cka(1e-150 * x[:, None]).isnan().any()


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=6, max_size=40))
@settings(max_examples=50, deadline=None)
def test_weights_make_attributes_independent(pairs):
    pairs = [*pairs, *((a, b) for a in range(3) for b in range(2))]
    first, second = torch.tensor(pairs).T
    weights = balancing_weights(combinations({"a": first, "b": second}))
    for a in range(3):
        for b in range(2):
            here = (first == a) & (second == b)
            assert float(weights[here].sum()) == pytest.approx(1 / 6)
    assert agreement(first, first, weights) == pytest.approx(1)
    assert agreement(torch.ones_like(first), first, weights) == pytest.approx(1 / 3)
    assert prevalence(torch.where(first == 1, 2, 0), weights) == (0, pytest.approx(2 / 3))


@given(st.integers(2, 30), st.integers(2, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_halves_share_every_combination(a, b, seed):
    cell = torch.tensor([0] * a + [1] * b)
    fitted = halves(cell, torch.Generator().manual_seed(seed))
    assert [int(fitted[cell == c].sum()) for c in (0, 1)] == [a // 2, b // 2]


def test_one_image_is_not_halved():
    with pytest.raises(UsageError, match="at least two images of every combination"):
        halves(torch.tensor([0, 0, 1]), torch.Generator())


def test_shares_of_patches_row_by_row():
    mask = torch.zeros(1, 8, 4, dtype=torch.bool)
    mask[0, :2], mask[0, 7, 3] = True, True
    shares = patch_shares(mask, 8)
    assert shares.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0.25]]
    for patches in (7, 4, 33):
        with pytest.raises(UsageError, match="square patches"):
            patch_shares(mask, patches)


def test_even_attention_has_the_mass_of_the_area():
    mask = torch.rand(5, 8, 8) < 0.3
    shares = patch_shares(mask, 16)
    rows = torch.full((5, 2, 17), 0.5 / 16)
    rows[..., 0] = 0.5  # the class token's attention to itself does not count
    area = mask.flatten(1).double().mean(1)
    torch.testing.assert_close(attention_mass(rows, shares, 1), area[:, None].expand(5, 2))
    rows = torch.zeros(1, 1, 17)
    rows[..., 3] = 0.1
    assert float(attention_mass(rows, shares[:1], 1)) == pytest.approx(float(shares[0, 2]))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=20), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_donors_have_another_value(values, seed):
    values = torch.tensor(values)
    receivers, donors = draw_donors(values, torch.Generator().manual_seed(seed))
    assert (values[receivers] != values[donors]).all()
    expected = len(values) if len(values.unique()) > 1 else 0
    assert len(receivers.unique()) == len(receivers) == expected
