"""Check every address that interpreted kernels load from or store to."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from tools.interpreter.observer import Observer, observed


class OutOfBoundsError(AssertionError):
    """A lane addressed memory outside the tensors of its launch."""


class _Sanitizer(Observer):
    def begin(self, kernel: str, tensors: list[Tensor], programs: int) -> None:
        self.kernel = kernel
        runs = [_runs(x) for x in tensors]
        starts = np.concatenate([s for s, _ in runs] or [np.empty(0, np.int64)])
        ends = np.concatenate([e for _, e in runs] or [np.empty(0, np.int64)])
        order = np.argsort(starts, kind="stable")
        self.starts = starts[order]
        self.ends = np.maximum.accumulate(ends[order])  # runs of different tensors may nest

    def access(self, addresses: np.ndarray, itemsize: int, stored: bool) -> None:
        addresses = addresses.astype(np.int64)
        run = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = run >= 0
        inside[inside] = addresses[inside] + itemsize <= self.ends[run[inside]]
        if not inside.all():
            wrong = int(addresses[~inside][0])
            if run[~inside][0] >= 0:
                distance = wrong - int(self.ends[run[~inside][0]])
                where = f"{distance} bytes past the end of the nearest element run before it"
            else:
                where = "before every tensor"
            raise OutOfBoundsError(
                f"{self.kernel} {'stores to' if stored else 'loads from'} {wrong:#x}, in no tensor "
                f"it was given ({where}; {int((~inside).sum())} lanes)"
            )


@contextmanager
def sanitizer() -> Iterator[None]:
    """Require inside the block that every unmasked lane addresses an element of a tensor of its launch.

    Exact where guard zones are not: a gap between the rows of a strided view is outside, and the
    check comes before the access.

    Raises:
        OutOfBoundsError: an AssertionError with the kernel and the address.
    """
    with observed(_Sanitizer()):
        yield


def _runs(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return first and past-the-end byte addresses of the contiguous runs of elements of ``x``."""
    base, size = x.data_ptr(), x.element_size()
    if x.numel() == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    by_stride = sorted(range(x.ndim), key=lambda axis: -x.stride(axis))
    if x.permute(by_stride).is_contiguous():
        return np.array([base]), np.array([base + x.numel() * size])
    offsets = np.zeros(1, np.int64)
    for n, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + stride * np.arange(1 if stride == 0 else n)).reshape(-1)
    offsets = np.unique(offsets)
    breaks = np.flatnonzero(np.diff(offsets) != 1)
    first = np.concatenate([offsets[:1], offsets[breaks + 1]])
    last = np.concatenate([offsets[breaks], offsets[-1:]])
    return base + first * size, base + (last + 1) * size
