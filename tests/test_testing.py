"""Tests of the error budget: what it allows, what it refuses, and what it says."""

import doctest

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast import testing
from diversevit_fast.testing import assert_within_budget

EPS = torch.finfo(torch.float32).eps


def test_it_is_public():
    assert dvf.testing.assert_within_budget is assert_within_budget
    assert "testing" in dvf.__all__


def test_the_example_runs():
    found = doctest.testmod(testing, optionflags=doctest.ELLIPSIS)
    assert found.attempted >= 8
    assert not found.failed


def compare(actual, eager, exact, terms=1, **options):
    """The check with an error of ``actual`` and of ``eager`` in the first of two elements."""
    row = torch.tensor([exact, exact], dtype=torch.float64)
    tensors = [row.clone().float() for _ in range(2)]
    for tensor, error in zip(tensors, (actual, eager), strict=True):
        tensor[0] += error
    assert_within_budget(*tensors, row, terms=terms, **options)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("error", "allowed"), [(0.5, True), (0.99, True), (1.01, False)])
def test_twice_the_error_of_eager_and_a_floor(error, allowed, sign):
    """Of eager's error 1/64 and a floor of sqrt(4) eps; errors that float32 represents nearly exactly."""
    budget = 2 / 64 + 2 * EPS
    if allowed:
        compare(sign * error * budget, 1 / 64, 1.0, terms=4)
        return
    with pytest.raises(AssertionError, match="exceeds budget"):
        compare(sign * error * budget, 1 / 64, 1.0, terms=4)


@pytest.mark.parametrize(("terms", "allowed"), [(16, True), (15, False)])
def test_the_floor_grows_with_the_longest_sum(terms, allowed):
    """Where eager rounds luckily: four ulps are allowed from 16 terms on."""
    if allowed:
        compare(4 * EPS, 0.0, 1.0, terms)
        return
    with pytest.raises(AssertionError, match="exceeds budget"):
        compare(4 * EPS, 0.0, 1.0, terms)


def test_the_floor_is_relative_to_the_tensor_itself():
    compare(4 * EPS, 0.0, 1.0, terms=16)
    with pytest.raises(AssertionError, match="exceeds budget"):
        compare(4 * EPS, 0.0, 1 / 2, terms=16)


def test_the_error_names_the_tensor_and_both_errors():
    said = r"^dq: error 2\.500e-01 exceeds budget 1\.250e-01 \(eager's error: 6\.250e-02\)$"
    with pytest.raises(AssertionError, match=said):
        compare(1 / 4, 1 / 16, 1.0, name="dq")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("which", "whose"), [(0, "the kernel"), (1, "eager PyTorch")])
def test_elements_that_are_not_finite_are_refused(value, which, whose):
    """Of eager too: an infinite error would allow anything."""
    tensors = [torch.ones(2, 3) for _ in range(2)]
    tensors[which][1, 2] = value
    with pytest.raises(AssertionError, match=f"^y: 1 non-finite of 6 elements of {whose}$"):
        assert_within_budget(*tensors, torch.ones(2, 3).double(), terms=1, name="y")


def test_a_shape_that_would_broadcast_is_refused():
    row = torch.ones(3)
    with pytest.raises(AssertionError, match=r"^result: shape \(1, 3\) instead of \(3,\)$"):
        assert_within_budget(row[None], row, row.double(), terms=1)


def test_an_empty_tensor_has_no_error():
    nothing = torch.empty(0, 3)
    assert_within_budget(nothing, nothing, nothing.double(), terms=1, name="x")
