"""A dispatch mode that counts what a step asks of the machine: products, bytes, launches, memory.

It works on tensors with and without memory alike. PyTorch's own operators are counted by the formulas of
``torch.utils.flop_counter``, this library's by those of the backend that would run them (``ops.work``).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from diversevit_kernels.common.torch_internals import TorchDispatchMode

from .._torch_internals import cpu_flash_attention, cpu_flash_attention_backward, tree_leaves
from ..ops.work import is_operator, order_of, work_of
from .fake import Disguise, refuse_value
from .memory import MemoryLog
from .torch_internals import argument_is_written, is_composite, overload_name, read_value

PRODUCTS, ELEMENTWISE, PENALTY = "matrix products", "elementwise", "penalty"
ATTENTION = {
    "forward": "attention forward",
    "backward": "attention backward",
    "double backward": "attention double backward",
}
KINDS = (PRODUCTS, *ATTENTION.values(), PENALTY, ELEMENTWISE)
PHASES = ("forward", "penalty", "backward", "optimizer")
"""The parts of a step: the forward pass; the penalty with its backward pass; the last backward pass; the update."""


class Call(NamedTuple):
    """One kind of call: what it is, and what each one asks of the machine.

    Attributes:
        kind: one of ``KINDS``.
        name: of the operator.
        dtype: of its first floating operand, without ``torch.``.
        flops: of the products; of ``ELEMENTWISE`` calls one for each number made by an operation.
        elementwise: operations besides the products.
        moved: bytes read and written, each operand and result once.
        narrow: of how many narrower products each is made.
    """

    phase: str
    kind: str
    name: str
    dtype: str
    flops: int
    elementwise: int
    moved: int
    launches: int
    narrow: int = 1
    ours: bool = False  # whether it is an operator of this library


class StepCounter(TorchDispatchMode):
    """Counts what runs inside.

    Args:
        architecture: of the GPU that it is counted for; None for a CPU.
        disguise: what fake tensors say of their device, if there are any.

    Attributes:
        calls: how often each kind of call was made.
        memory: births and deaths of storages.
        phase: one of ``PHASES``, set from outside; None counts nothing and notes no memory.
    """

    def __init__(self, architecture: str | None = None, disguise: Disguise | None = None):
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.memory = MemoryLog()
        self.phase: str | None = None
        self._architecture, self._disguise = architecture, disguise

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        disguise = self._disguise
        if disguise is not None:
            if func is torch.ops.prim.device.default:
                return disguise.device_of(args[0])
            if func is read_value:
                return refuse_value(args[0], self.phase)
            kwargs = disguise.device_for(kwargs)
        if is_composite(func):
            with self:
                results = func.decompose(*args, **kwargs)
            if results is not NotImplemented:
                return results
        results = func(*args, **kwargs)
        if disguise is not None:
            disguise.made(args, results)
        if self.phase is not None:
            self._count(func, args, kwargs, results)
        return results

    def _count(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        assert self.phase is not None
        given, made = tensors_in((args, kwargs)), tensors_in(results)
        part = {"forward": "activations", "penalty": "second order"}.get(self.phase, self.phase)
        ours = is_operator(func)
        self.memory.add(made, part, pooled=ours and self._architecture is None)
        name = overload_name(func)
        if ours:
            work = work_of(name, args, self._architecture)
            self.memory.use(work.workspace)
            kind = _kind_of_ours(name)
            call = Call(
                *(self.phase, kind, name, dtype_of(given), work.products or work.elementwise),
                work.elementwise if work.products else 0,
                moved_bytes(func, given, made),
                work.launches,
                work.narrow,
                True,
            )
            self.calls[call] += 1
            return
        if "empty" in name or func.namespace not in ("aten", "torchvision"):
            return
        if not argument_is_written(func) and all(_is_view(x, given) for x in made):
            return
        kind, flops = _products_of(func, args, kwargs, results)
        moved = moved_bytes(func, given, made)
        launches = _launches(name, given) if self._architecture else 1
        operations = max((x.numel() for x in (*given, *made)), default=0)
        if name.startswith("_foreach") or name.startswith("_fused"):
            operations = sum(x.numel() for x in given)
        call = Call(
            *(self.phase, kind, name, dtype_of(given or made), flops or operations),
            *(0, moved, launches),
        )
        self.calls[call] += 1


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in a tree of arguments or results."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def dtype_of(tensors: Iterable[Tensor]) -> str:
    """The name of the first floating dtype; that of the first tensor where none is floating."""
    dtypes = [x.dtype for x in tensors]
    floating = next((d for d in dtypes if d.is_floating_point), dtypes[0] if dtypes else None)
    return str(floating).removeprefix("torch.")


def bytes_of(x: Tensor) -> int:
    """Distinct bytes of a tensor: expanded axes count once."""
    kept = [n for n, step in zip(x.shape, x.stride(), strict=True) if step or not n]
    return math.prod(kept) * x.itemsize


_WRITE_ONLY = {"zero_", "fill_", "copy_", "normal_", "uniform_", "bernoulli_"}


def moved_bytes(func: Any, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that an operator reads and writes: each operand and each result once."""
    distinct = {id(x): x for x in given}
    read = sum(map(bytes_of, distinct.values()))
    if not argument_is_written(func):
        return read + sum(map(bytes_of, made))
    name = overload_name(func)
    written = sum(map(bytes_of, made or given[:1]))
    if name.startswith(("_foreach", "_fused")):
        return 2 * read  # what is read of lists is nearly all written again
    return read + written - (bytes_of(given[0]) if name in _WRITE_ONLY and given else 0)


def _is_view(x: Tensor, given: list[Tensor]) -> bool:
    storage = x.untyped_storage()
    return any(y.untyped_storage() is storage for y in given)


def _kind_of_ours(name: str) -> str:
    if "attention" in name:
        return ATTENTION[order_of(name)]
    return PENALTY if "penalty" in name else ELEMENTWISE


def _of_shapes(formula: Callable[..., int], places: tuple[int, ...]) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **_: Any) -> int:
        return formula(*(args[i].shape for i in places))

    return count


_FORMULAS: dict[Any, Callable[..., int]] = {
    cpu_flash_attention: _of_shapes(sdpa_flop_count, (0, 1, 2)),
    cpu_flash_attention_backward: _of_shapes(sdpa_backward_flop_count, (0, 1, 2, 3)),
}
"""What PyTorch's registry lacks."""


def _products_of(func: Any, args: Any, kwargs: Any, results: Any) -> tuple[str, int]:
    """The kind of a call of PyTorch's, and FLOPs of its products; 0 for an elementwise one."""
    packet = func.overloadpacket
    name = overload_name(func)
    written = getattr(torch.ops.aten, name.rstrip("_"), packet) if name.endswith("_") else packet
    formula = _FORMULAS.get(packet) or flop_registry.get(written)
    if formula is None:
        return ELEMENTWISE, 0
    flops = int(formula(*args, **kwargs, out_val=results))
    if "attention" in name:
        return ATTENTION["backward" if "backward" in name else "forward"], flops
    return PRODUCTS, flops


_TENSORS, _CHUNK, _BLOCKS = 36, 1 << 16, 320
"""Of a launch of PyTorch's kernels for lists: tensors at most, elements of a chunk, chunks."""


def _launches(name: str, given: list[Tensor]) -> int:
    """Kernels that one of PyTorch's operators starts on a GPU: one, or of a list as many as it needs."""
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = 4 if "adam" in name else 2
    tensors = -(-len(given) // lists)
    chunks = sum(-(-x.numel() // _CHUNK) for x in given) // lists
    return max(1, -(-tensors // _TENSORS), -(-chunks // _BLOCKS))
