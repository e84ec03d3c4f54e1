"""Scratch memory of one call: a buffer per name, allocated once and handed out as tile-shaped views."""

import math

import torch
from torch import Tensor


class Scratch:
    """Named buffers that grow to the largest shape asked for and are then reused.

    A view is valid until the same name is asked for again. Contents are undefined.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised contiguous tensor of ``shape``."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._buffers[name][:size].view(shape)

    def load(self, name: str, source: Tensor) -> Tensor:
        """Return ``source`` contiguous and in the accumulation dtype; copied only if it is not so already."""
        if source.dtype == self._dtype and source.is_contiguous():
            return source
        return self.get(name, *source.shape).copy_(source)
