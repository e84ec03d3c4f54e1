"""Count what kernels load, store and compute, lane by lane in Triton's interpreter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from tools.interpreter.observer import Observer, observed
from tools.interpreter.quick import quick

COMPACT_BEYOND = 1 << 20
"""Number of addresses that are kept before duplicates are dropped."""


class Accesses:
    """Collects the addresses that lanes access: bytes in all, and distinct ones."""

    def __init__(self):
        self.requested = 0
        self._pending: dict[int, list[np.ndarray]] = {}
        self._waiting = 0

    def add(self, addresses: np.ndarray, itemsize: int) -> None:
        """Add an access of ``itemsize`` bytes at each address."""
        self.requested += addresses.size * itemsize
        self._pending.setdefault(itemsize, []).append(addresses)
        self._waiting += addresses.size
        if self._waiting > COMPACT_BEYOND:
            self._pending = {size: [found] for size, found in self.distinct().items()}
            self._waiting = 0

    def distinct(self) -> dict[int, np.ndarray]:
        """Return element size -> sorted distinct addresses."""
        return {size: np.unique(np.concatenate(parts)) for size, parts in self._pending.items()}

    @property
    def unique(self) -> int:
        return unique_bytes([self])


def unique_bytes(accesses: Sequence[Accesses]) -> int:
    """Return the number of distinct bytes of several launches' accesses."""
    total = Accesses()
    for one in accesses:
        for size, addresses in one.distinct().items():
            total.add(addresses, size)
    return sum(size * addresses.size for size, addresses in total.distinct().items())


@dataclass
class LaunchTraffic:
    """The counts of one launch. Products include padding lanes unless said otherwise."""

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
    """Count inside the block; the list grows by a ``LaunchTraffic`` per launch."""
    counter = _Counter()
    with quick(), observed(counter):
        yield counter.launches
