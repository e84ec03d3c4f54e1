"""Check kernels against an error budget: at most twice the error of eager PyTorch, measured in float64.

For tests of a custom kernel, in place of tolerances chosen by hand.
"""

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, *, terms: int, name: str = "result"
) -> None:
    """Assert that ``actual`` is at most about twice as wrong as eager PyTorch on the same inputs.

    The rule, with errors as largest differences from ``exact`` over all elements::

        error(actual) <= 2 error(eager) + sqrt(terms) eps max|exact|

    The second summand is a floor, with ``eps`` the machine epsilon of eager's dtype. It is needed because eager's
    rounding errors may happen to cancel, which would leave a budget of nearly zero. Adding ``terms`` numbers in
    another order changes a sum by about ``sqrt(terms)`` roundings of its size, so a kernel that sums in another order
    than eager is given as much. The floor is relative to this tensor's own largest element: compare each result of a
    kernel by itself, since a floor taken from the largest of several results would hide a small one that is wrong
    altogether.

    Use random inputs, and those that training leads to: large scores, masked rows, trained weights.

    Args:
        actual: what the kernel returned.
        eager: the same computation by PyTorch's own operators, in the kernel's dtype.
        exact: the same in float64, from the same inputs, which were rounded to the kernel's dtype before.
        terms: number of terms of the longest sum.
        name: what an error calls the tensor.

    Raises:
        AssertionError: one line that names the tensor: its shape differs, an element of ``actual`` or ``eager`` is not
            finite, or the error exceeds the budget; then by how much.

    Example: a LayerNorm that computes the variance as a difference, which cancels::

        >>> import torch
        >>> from torch.nn.functional import layer_norm
        >>> from diversevit_fast.testing import assert_within_budget
        >>> def kernel(x):
        ...     variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2
        ...     return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5)
        >>> def check(x):
        ...     eager, exact = layer_norm(x, (256,)), layer_norm(x.double(), (256,))
        ...     assert_within_budget(kernel(x), eager, exact, terms=256, name="y")
        >>> x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        >>> check(x)
        >>> check(x + 100)
        Traceback (most recent call last):
            ...
        AssertionError: y: error ... exceeds budget ... (eager's error: ...)
    """
    assert actual.shape == exact.shape, (
        f"{name}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    )
    for tensor, whose in ((actual, "the kernel"), (eager, "eager PyTorch")):
        wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
        assert not wrong, f"{name}: {wrong} non-finite of {tensor.numel()} elements of {whose}"
    rounding = _error(eager, exact)
    budget = 2 * rounding + terms**0.5 * torch.finfo(eager.dtype).eps * _largest(exact)
    error = _error(actual, exact)
    assert error <= budget, (
        f"{name}: error {error:.3e} exceeds budget {budget:.3e} (eager's error: {rounding:.3e})"
    )


def _error(x: Tensor, exact: Tensor) -> float:
    """Return the largest difference between the elements of ``x`` and ``exact``."""
    return _largest(x.double() - exact)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
