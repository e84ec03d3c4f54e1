"""Guard zones: memory around a tensor that must not change, poisoned so that reading it shows.

The poison is NaN, in whole numbers the largest.
"""

import torch
from torch import Tensor

ZONE = 256
"""Elements on either side."""


class Guards:
    """Hands out NaN-filled tensors inside guard zones, and checks the zones afterwards."""

    def __init__(self):
        self.zones: list[tuple[Tensor, torch.Size]] = []

    def empty(self, shape, *, dtype, device) -> Tensor:
        """Like ``torch.empty``: dense, but every element is poisoned and so are its surroundings."""
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * ZONE,), _poison(dtype), dtype=dtype, device=device)
        self.zones.append((whole, torch.Size(shape)))
        return whole[ZONE : ZONE + size].view(shape)

    def place(self, x: Tensor, device: torch.device | None = None) -> Tensor:
        """A copy of ``x`` with its strides (its storage extent at least), between poisoned zones.

        Expanded axes are expanded again. ``device``: that of x if None.
        """
        base = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())]
        extent = 1 + sum((n - 1) * s for n, s in zip(base.shape, base.stride(), strict=True))
        room = self.empty((max(0, extent),), dtype=x.dtype, device=device or x.device)
        placed = room.as_strided(base.shape, base.stride(), ZONE)
        placed.copy_(base)
        return placed.expand(x.shape).requires_grad_(x.requires_grad)

    def check(self) -> None:
        """No element outside the tensors was written.

        Raises:
            AssertionError: a kernel stored out of bounds.
        """
        for whole, shape in self.zones:
            for zone in (slice(0, ZONE), slice(len(whole) - ZONE, None)):
                same = whole[zone].isnan() | (whole[zone] == _poison(whole.dtype))
                assert same.all(), f"stored outside a result of shape {tuple(shape)}"


def _poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
