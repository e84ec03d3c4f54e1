"""Count what PyTorch's own operators must move: every tensor into and out of every operator, once."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITE_ONLY = {"zero_", "fill_", "copy_", "normal_", "uniform_"}
"""In-place operators that do not read what they overwrite."""


def bytes_of(x: Tensor) -> int:
    """Return the distinct bytes of a tensor: expanded axes count once."""
    elements = 1
    for n, stride in zip(x.shape, x.stride(), strict=True):
        elements *= n if stride or n == 0 else 1
    return elements * x.element_size()


class TensorTraffic(TorchDispatchMode):
    """Adds up the bytes of the distinct tensors into and out of each ATen operator.

    This is a lower bound on what unfused execution moves: an operator passes once over each tensor, views and
    allocations are free. Launches of Triton kernels are not seen.

    Attributes:
        total: bytes so far.
        by_operator: bytes of each operator.
    """

    def __init__(self):
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_operator.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":  # an operator of ours: what it does inside is what counts
            with self:
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.by_operator[func._overloadpacket.__name__] += _moved(func, (args, kwargs), out)
        return out


def _moved(func: Any, given: Any, out: Any) -> int:
    name = func._overloadpacket.__name__
    ins = {id(t): t for t in tree_leaves(given) if isinstance(t, Tensor)}
    outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    if "empty" in name:
        return 0
    mutable = func._schema.is_mutable
    storages = {t.untyped_storage().data_ptr() for t in ins.values()}
    if not mutable and outs and all(t.untyped_storage().data_ptr() in storages for t in outs):
        return 0
    read = list(ins.values())
    if mutable and (name in WRITE_ONLY or "out" in (given[1] or {})):
        overwritten = {id(t) for t in outs}
        read = [t for t in read if id(t) not in overwritten]
    distinct = {(t.data_ptr(), t.shape, t.stride(), t.dtype): t for t in read}
    return sum(map(bytes_of, distinct.values())) + sum(map(bytes_of, outs))
