"""The memory of a step, from births and deaths of its storages that are replayed: the peak, and what it is made of."""

import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from diversevit_kernels.cpu.runtime.allocator import MAX_CACHED_BYTES, MIN_BYTES

PARTS = (
    "parameters",
    "gradients",
    "optimizer state",
    "batch",
    "activations",
    "second order",
    "backward",
    "optimizer",
    "workspace",
    "cached",
)
"""What memory is for. Activations were born in the forward pass, "second order" in the penalty's own backward pass,
"backward" in the last one and are no parameter's gradient, "optimizer" in the update. "workspace" is a kernel's scratch
memory, and "cached" what the CPU kernels' allocator keeps of freed results."""


class _Event(NamedTuple):
    storage: int
    born: bool  # or dead
    workspace: int = 0


class Peak(NamedTuple):
    """The largest memory at once, in bytes, and what it is made of at that moment, by ``PARTS``."""

    total: int
    parts: dict[str, int]


class MemoryLog:
    """Births and deaths of storages in their order. Sizes are those of PyTorch, before any rounding of an allocator."""

    def __init__(self):
        self._events: list[_Event] = []
        self._sizes: list[int] = []
        self._parts: list[str] = []
        self._pooled: list[bool] = []
        self._known: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor], part: str, pooled: bool = False) -> None:
        """Note the storages of ``tensors`` that are new.

        Args:
            pooled: whether they come from the CPU kernels' allocator, which keeps large ones when they die.
        """
        for x in tensors:
            storage = x.untyped_storage()
            if id(storage) in self._known:
                continue
            number = len(self._sizes)
            self._known[id(storage)] = number
            self._sizes.append(storage.nbytes())
            self._parts.append(part)
            self._pooled.append(pooled and storage.nbytes() >= MIN_BYTES)
            self._events.append(_Event(number, True))
            weakref.finalize(storage, self._dies, id(storage), number).atexit = False

    def relabel(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say what storages are for that were noted as something else."""
        for x in tensors:
            number = self._known.get(id(x.untyped_storage()))
            if number is not None:
                self._parts[number] = part

    def use(self, workspace: int) -> None:
        """Note that a kernel runs with so many bytes of scratch memory."""
        if workspace:
            self._events.append(_Event(-1, True, workspace))

    def peak(self) -> Peak:
        """Replay everything so far."""
        pool = _Pool()
        alive: Counter[str] = Counter()
        now, best = 0, Peak(0, {})
        for storage, born, workspace in self._events:
            if storage >= 0:
                size, part = self._sizes[storage], self._parts[storage]
                alive[part] += size if born else -size
                now += size if born else -size
                if self._pooled[storage]:
                    pool.take(size) if born else pool.keep(size)
            if now + pool.bytes + workspace > best.total:
                parts = {**alive, "workspace": workspace, "cached": pool.bytes}
                best = Peak(now + pool.bytes + workspace, parts)
        return Peak(best.total, {part: best.parts.get(part, 0) for part in PARTS})

    def _dies(self, key: int, number: int) -> None:
        if self._known.get(key) == number:
            del self._known[key]
        self._events.append(_Event(number, False))


class _Pool:
    """What the CPU kernels' allocator does with freed results: see ``diversevit_kernels.cpu.runtime.allocator``."""

    def __init__(self):
        self.bytes = 0
        self._blocks: OrderedDict[int, int] = (
            OrderedDict()
        )  # number of a block -> its size, oldest first
        self._next = 0

    def take(self, size: int) -> None:
        """A result of this size is made: of a block of its size, if there is one."""
        for number in reversed(self._blocks):
            if self._blocks[number] == size:
                self.bytes -= self._blocks.pop(number)
                return

    def keep(self, size: int) -> None:
        """A result dies; its block stays, and the oldest ones beyond the limit go."""
        self._blocks[self._next] = size
        self._next += 1
        self.bytes += size
        while self.bytes > MAX_CACHED_BYTES:
            self.bytes -= self._blocks.popitem(last=False)[1]


def added(parts: Mapping[str, int], **more: int) -> dict[str, int]:
    """Parts with bytes added to some of them."""
    return {part: size + more.get(part.replace(" ", "_"), 0) for part, size in parts.items()}
