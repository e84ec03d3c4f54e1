"""What a block may not change when it runs, if it is to be run again: what it was given, and its buffers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._torch_internals import own_buffers, write_count
from ..errors import UnsupportedError


class BeforeRun:
    """What a block's run could change, as it was when this was made.

    Args:
        module: the block.
        given: the tensors in its arguments.
    """

    def __init__(self, module: nn.Module, given: Sequence[Tensor]):
        self._given = [(x, _writes(x)) for x in given]
        self._buffers = [
            (place, name, x, _writes(x), x.detach().clone())
            for place in map(own_buffers, module.modules())
            for name, x in place.items()
            if x is not None
        ]

    def refuse_changed_inputs(self, name: str) -> None:
        """Refuse a block that wrote to what it was given.

        Raises:
            UnsupportedError: it did.
        """
        if any(_writes(x) != writes for x, writes in self._given):
            raise UnsupportedError(
                f"checkpoint: {name} changes a tensor that it is given, so it cannot be run again; "
                "let it make a new one, or pass checkpoint_blocks=False"
            )

    def put_buffers_back(self) -> bool:
        """Give buffers the values that they had; returns whether one was changed."""
        changed = any(
            place.get(name) is not x or _writes(x) != writes
            for place, name, x, writes, _ in self._buffers
        )
        if changed:
            with torch.no_grad():
                for place, name, x, _, value in self._buffers:
                    place[name] = x
                    x.copy_(value)
        return changed


def _writes(x: Tensor) -> int:
    return 0 if x.is_inference() else write_count(x)
