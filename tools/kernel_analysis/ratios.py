"""A check for CI that ours did not get slower relative to eager: what each does is counted, no time is measured.

``python -m tools.kernel_analysis.ratios`` counts what one run of a row asks of the machine and compares ours
over its baseline with the ratio recorded in ``benchmarks/results/ratios.json``; above it by more than
``TOLERANCE`` fails, with one line each. ``--record`` writes the file anew. Counts are the same on every
machine, however busy:

* ``products``: floating-point operations of matrix products.
* ``traffic``: bytes that operators read and write, an operand once per call; views are free.
* ``memory``: bytes alive at the peak, above inputs and parameters.
* ``calls``: operators that do something.

Calls inside our operators count, but not for themselves. A compiled kernel, that is the C++ of GELU and LayerNorm or a
formula compiled by Inductor, counts as one call that reads its arguments and writes its results, whether or not this
machine has a compiler. C++ kernels with products inside do not run: the path without them is counted. What a count
cannot see: the time of a call, threads, caches.
"""

import argparse
import json
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import timing
from benchmarks.orders import ORDERS
from benchmarks.registry import Implementation, named
from benchmarks.runner import workload_of
from benchmarks.steps import StepSpec, step_implementations
from benchmarks.workloads import OperatorSpec
from diversevit_fast.ops import backends
from diversevit_kernels.cpu.attention import native as attention_native
from diversevit_kernels.cpu.gelu import native as gelu_native
from diversevit_kernels.cpu.head_penalty import routed_native as routed_head_penalty_native
from diversevit_kernels.cpu.layer_norm import native as layer_norm_native
from diversevit_kernels.cpu.runtime import inductor

COUNTS = ("products", "traffic", "memory", "calls")
TOLERANCE = 0.05
"""Of a ratio, upwards: room for another PyTorch's operators, not for one more product or pass."""

B, H, N, D = 2, 3, 197, 64
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "attention": ((B, H, N, D),) * 3,
    "layer_norm": ((B, N, H * D), (H * D,), (H * D,)),
    "gelu": ((B, N, 4 * H * D),),
    "head_penalty": ((B, H, N, H * D),),
    "routed_head_penalty": ((B, N, 3, H, D), (3, H, D, H * D)),
}
"""Of a ViT-Ti: large enough for the paths that users' models take."""
STEPS = {"paper step": ("erm", 4), "all-layers step": ("eager", 1)}
"""Step -> what ours is compared with, and the batch."""


class Counts(TorchDispatchMode):
    """Counts ``COUNTS`` of what runs inside; our operators' kernels are to be wrapped by ``inside``."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._alive = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # a composite operator, such as matmul, is what it consists of
            results = func.decompose(*args, **kwargs)
        if results is not NotImplemented:
            return results
        results = func(*args, **kwargs)
        if func.namespace == "diversevit":
            return results
        written = {a.name for a in func._schema.arguments if a.is_out}
        read = _tensors((args, {n: x for n, x in kwargs.items() if n not in written}))
        made = _tensors(results)
        fresh = [x for x in made if not any(_same(x, y) for y in _tensors((args, kwargs)))]
        self._track(fresh)
        if not (fresh or func._schema.is_mutable) or "empty" in func._schema.name:
            return results  # a view, or memory without contents
        self._add(read, made)
        packet = func.overloadpacket
        base = getattr(torch.ops.aten, packet.__name__.rstrip("_"), packet)
        if flops := flop_registry.get(packet) or flop_registry.get(base):
            self.counts["products"] += flops(*args, **kwargs, out_val=results)
        return results

    def formula(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled formula as one call; to be called inside."""

        def call(*operands: Tensor) -> Any:
            with _disable_current_modes():
                results = function(*operands)
            self._track(_tensors(results))
            self._add(_tensors(operands), _tensors(results))
            return results

        return call

    def gelu(
        self, direction: str, form: str, *results: str, **operands: Tensor
    ) -> tuple[Tensor, ...]:
        """In place of ``gelu_native.call``: zeros."""
        x = operands["x"]
        return self.formula(lambda *_: tuple(torch.zeros_like(x) for _ in results))(
            *operands.values()
        )

    def layer_norm(
        self, direction: str, x: Tensor, axes: int, eps: float = 0.0, **tensors: Tensor | None
    ) -> None:
        """In place of ``layer_norm_native.call``: results are set to zero."""
        given = {name: t for name, t in tensors.items() if t is not None}
        names = ("y", "dx", "gx", "gdy", "dw", "db", "gw")
        results = [given[name] for name in names if name in given]
        with _disable_current_modes():
            for result in (*results, *((given["mean"], given["rstd"]) if "y" in given else ())):
                result.zero_()
        self._add([x], list(given.values()))

    def inside(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """``kernel`` of one of our operators, during which the mode is off unless entered again."""

        def call(*args: Any, **options: Any) -> Any:
            with self:
                return kernel(*args, **options)

        return call

    def _add(self, read: list[Tensor], made: list[Tensor]) -> None:
        self.counts["calls"] += 1
        self.counts["traffic"] += sum(x.numel() * x.itemsize for x in (*read, *made))

    def _track(self, made: list[Tensor]) -> None:
        for storage in (x.untyped_storage() for x in made):
            key = storage._cdata
            if key not in self._storages:
                self._storages[key] = storage.nbytes()
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._drop, key)
        self.counts["memory"] = max(self.counts["memory"], self._alive)

    def _drop(self, key: int) -> None:
        self._alive -= self._storages.pop(key)


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def _same(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


class _Inside:
    """A backend's functions, during which a mode is off unless entered again."""

    def __init__(self, kernels: Any, counts: Counts):
        self._kernels, self._counts = kernels, counts

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._counts.inside(getattr(self._kernels, name))


@contextmanager
def counting() -> Iterator[Counts]:
    """Everything that runs inside is counted, our operators' kernels and formulas included."""
    counts, kernels_of = Counts(), backends._kernels
    with (
        mock.patch.object(backends, "_kernels", lambda *key: _Inside(kernels_of(*key), counts)),
        mock.patch.object(attention_native, "library", return_value=None),
        mock.patch.object(routed_head_penalty_native, "library", return_value=None),
        mock.patch.object(gelu_native, "library", return_value="counted"),
        mock.patch.object(gelu_native, "call", counts.gelu),
        mock.patch.object(layer_norm_native, "library", return_value="counted"),
        mock.patch.object(layer_norm_native, "call", counts.layer_norm),
        mock.patch.object(inductor, "compiled", lambda f, dtype: counts.formula(f.function)),
        counts,
    ):
        yield counts


class Comparison(NamedTuple):
    """One row: what is computed, and by which two implementations."""

    name: str
    spec: OperatorSpec | StepSpec
    ours: Implementation
    baseline: Implementation


def rows(tiny: bool = False) -> Iterator[Comparison]:
    """Yield every row: operators to first and to second order, and training steps."""
    for operator, shapes in SHAPES.items():
        ours, eager = (named(operator, name) for name in ("ours", "eager"))
        shapes = tuple(tuple(min(n, 8) for n in s) for s in shapes) if tiny else shapes
        for order in ORDERS[1:]:
            spec = OperatorSpec(operator, shapes, torch.float32, order, "cpu")
            yield Comparison(f"{operator} {order}", spec, ours, eager)
    for step, (baseline, batch) in STEPS.items():
        by_name = {one.name: one for one in step_implementations(step)}
        spec = StepSpec(step, batch, tiny, "cpu")
        yield Comparison(f"{step} over {baseline}", spec, by_name["ours"], by_name[baseline])


def ratios(tiny: bool = False) -> dict[str, dict[str, float]]:
    """Count every row; return ours over its baseline."""
    found = {}
    for row in rows(tiny):
        workload = workload_of(row.spec)
        counts = [_counted(workload.job(one)) for one in (row.ours, row.baseline)]
        found[row.name] = {
            what: round(counts[0][what] / counts[1][what], 4) for what in COUNTS if counts[1][what]
        }
    return found


def _counted(job: Callable[[], object]) -> Counter[str]:
    job()
    with counting() as counts:
        job()
    return counts.counts


def slower(
    found: Mapping[str, Mapping[str, float]], recorded: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """One line for each ratio that is more than ``TOLERANCE`` above the recorded one, or has none."""
    lines = []
    for name, row in found.items():
        for what, ratio in row.items():
            before = recorded.get(name, {}).get(what)
            if before is None:
                lines.append(f"{name}, {what}: no recorded ratio; run with --record")
            elif ratio > before * (1 + TOLERANCE):
                more = 100 * (ratio / before - 1)
                lines.append(
                    f"{name}, {what}: ours / baseline is {ratio:.3f}, was {before:.3f} ({more:+.0f} %)"
                )
    return lines


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"{'ours / baseline':36}" + "".join(f"{what:>10}" for what in COUNTS)]
    for name, row in found.items():
        cells = (f"{row[what]:>10.3f}" if what in row else " " * 10 for what in COUNTS)
        lines.append(f"{name:36}" + "".join(cells))
    return "\n".join(lines)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="make these the recorded ratios")
    options = parser.parse_args(given)
    torch.set_num_threads(1)  # chunks of the paths that are not compiled grow with it
    found = ratios()
    print(table(found))
    if options.record:
        print(timing.write("ratios", {"torch": torch.__version__, "ratios": found}))
        return 0
    path = timing.RESULTS / "ratios.json"
    lines = slower(found, json.loads(path.read_text(encoding="utf-8"))["ratios"])
    for line in lines:
        print(f"slower: {line}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
