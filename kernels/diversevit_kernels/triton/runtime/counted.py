"""The work of an operator's call on a GPU: its host function runs on tensors without memory, and no kernel is started.

What it would launch, with which tiles, and what it allocates is decided by the code that decides it on the GPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...common.torch_internals import tree_flatten
from ...common.work import Work
from . import device, launch, tensors

Products = Mapping[str, Callable[[launch.Launch], int]]
"""Name of a launch table -> the FLOPs of its kernel's matrix products in a launch, padding of tiles included."""


def work_of(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    products: Products,
    architecture: str,
    elementwise: int = 0,
) -> Work:
    """The work of ``function(*operands)`` on a GPU of ``architecture``.

    Args:
        operands: tensors on the device ``meta``, numbers, and named tuples of both.
        products: of the operator's kernels.
        elementwise: operations besides the products.
    """
    with (
        device.pretend(architecture),
        launch.recording(run=False) as launches,
        tensors.allocations.collecting() as allocated,
    ):
        results = [x for x in tree_flatten(function(*operands))[0] if isinstance(x, Tensor)]
    started = [one for one in launches if one.grid[0]]
    returned = {id(x.untyped_storage()) for x in results}
    scratch = {id(x.untyped_storage()): x.untyped_storage().nbytes() for x in allocated}
    return Work(
        products=sum(products[one.name](one) for one in started if one.name in products),
        launches=len(started),
        workspace=sum(size for storage, size in scratch.items() if storage not in returned),
        elementwise=elementwise,
        narrow=max((_narrow(one) for one in started if one.name in products), default=1),
    )


def _narrow(one: launch.Launch) -> int:
    """Of how many products on tensor cores one of float32 is made."""
    const = one.constants["const"]
    said = getattr(const, "PRECISION", "ieee")
    return {"tf32x3": 3, "bf16x3": 3, "bf16x6": 6}.get(said, 1)
