"""What kernels load, store and compute, counted lane by lane in Triton's interpreter.

``counting()`` collects a ``LaunchTraffic`` per launch; ``sanitizer()`` lets no lane touch memory outside
the tensors its launch was given. Both need ``TRITON_INTERPRET=1`` and work on any kernel, whoever launches it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tools.kernel_analysis.interpreted import Observer, observed, quick

COMPACT_BEYOND = 1 << 20
"""Addresses kept before duplicates are dropped."""


class Accesses:
    """The bytes that lanes asked for, and which distinct ones they were."""

    def __init__(self):
        self.requested = 0
        self._pending: dict[int, list[np.ndarray]] = {}
        self._waiting = 0

    def add(self, addresses: np.ndarray, itemsize: int) -> None:
        """One access of ``itemsize`` bytes at each address."""
        self.requested += addresses.size * itemsize
        self._pending.setdefault(itemsize, []).append(addresses)
        self._waiting += addresses.size
        if self._waiting > COMPACT_BEYOND:
            self._pending = {size: [found] for size, found in self.distinct().items()}
            self._waiting = 0

    def distinct(self) -> dict[int, np.ndarray]:
        """Element size -> sorted distinct addresses."""
        return {size: np.unique(np.concatenate(parts)) for size, parts in self._pending.items()}

    @property
    def unique(self) -> int:
        return unique_bytes([self])


def unique_bytes(accesses: Sequence[Accesses]) -> int:
    """Distinct bytes over several launches' accesses."""
    total = Accesses()
    for one in accesses:
        for size, addresses in one.distinct().items():
            total.add(addresses, size)
    return sum(size * addresses.size for size, addresses in total.distinct().items())


@dataclass
class LaunchTraffic:
    """What one launch did, padding lanes of products included unless said otherwise."""

    kernel: str
    tensors: list[Tensor] = field(repr=False)  # kept alive: an address must not be given out twice
    programs: int = 0
    read: Accesses = field(default_factory=Accesses)
    written: Accesses = field(default_factory=Accesses)
    dot_flops: int = 0  # 2 M N K per product of tiles
    useful_flops: int = 0  # without all-zero rows, columns and depths: what padding did not waste
    elementwise: int = 0  # floating-point results of elementwise operations and reductions
    special: int = 0  # of these: exp, log, erf, roots

    @property
    def requested(self) -> int:
        return self.read.requested + self.written.requested

    @property
    def unique(self) -> int:
        """Distinct bytes read plus distinct bytes written."""
        return self.read.unique + self.written.unique


class _Counter(Observer):
    def __init__(self):
        self.launches: list[LaunchTraffic] = []

    def begin(self, kernel: str, tensors: list[Tensor], programs: int) -> None:
        self.launches.append(LaunchTraffic(kernel, tensors, programs))

    def access(self, addresses: np.ndarray, itemsize: int, stored: bool) -> None:
        last = self.launches[-1]
        (last.written if stored else last.read).add(addresses, itemsize)

    def dot(self, a: np.ndarray, b: np.ndarray) -> None:
        last = self.launches[-1]
        last.dot_flops += 2 * a.size * b.shape[-1]
        depth = (a != 0).any(-2) & (b != 0).any(-1)
        rows, columns = (a != 0).any(-1).sum(-1), (b != 0).any(-2).sum(-1)
        last.useful_flops += int((2 * rows * columns * depth.sum(-1)).sum())

    def elementwise(self, results: int, special: bool) -> None:
        self.launches[-1].elementwise += results
        self.launches[-1].special += results if special else 0


@contextmanager
def counting() -> Iterator[list[LaunchTraffic]]:
    """The launches of the block, with what each loads, stores and computes."""
    counter = _Counter()
    with quick(), observed(counter):
        yield counter.launches


class OutOfBoundsError(AssertionError):
    """A lane touched memory outside the tensors of its launch."""


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
    """Inside the block every unmasked lane must address an element of a tensor its launch was given.

    Exact where guard zones are not: a gap between the rows of a strided view is outside, and the
    check comes before the access.

    Raises:
        OutOfBoundsError: an AssertionError with the kernel and the address.
    """
    with observed(_Sanitizer()):
        yield


def _runs(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First and past-the-end byte addresses of the contiguous runs of elements of ``x``."""
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
