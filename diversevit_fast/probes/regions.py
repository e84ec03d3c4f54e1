"""Regions of the images: which part of them holds an attribute, and the images in which that part is another's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import usage_error

Swap = Callable[[Tensor, Tensor], Tensor]
"""From images and donors ``[b, C, height, width]`` to the images with one part taken from the donors."""


def check_regions(regions: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return the regions as boolean tensors, ``[height, width]`` or ``[n, height, width]``.

    Raises:
        UsageError: something else.
    """
    if regions is None:
        return {}
    if not isinstance(regions, Mapping):
        got = type(regions).__name__
        raise usage_error("regions", "a dictionary of masks by name", got, "name each mask")
    found = {}
    for name, mask in regions.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise usage_error("regions", "names that are words", repr(name), "rename it")
        mask = torch.as_tensor(mask).cpu()
        if mask.dtype != torch.bool or mask.ndim not in (2, 3) or not mask.any():
            got = f"{mask.dtype} {list(mask.shape)}"
            wanted = "booleans [height, width] or [n, height, width], some of them True"
            raise usage_error(f"regions[{name!r}]", wanted, got, "True marks the region's pixels")
        found[name] = mask
    return found


def masks_of(name: str, mask: Tensor, seen: int, images: Tensor) -> Tensor:
    """Return the region in a batch that ``seen`` images precede: bool ``[1 or b, height, width]``.

    Raises:
        UsageError: the images have another size, or there are fewer masks than images.
    """
    size = tuple(images.shape[-2:])
    found = mask[None] if mask.ndim == 2 else mask[seen : seen + len(images)]
    if tuple(found.shape[-2:]) != size or len(found) not in (1, len(images)):
        wanted = f"a mask of {size[0]} x {size[1]} pixels, one for all images or one for each"
        got = list(mask.shape)
        raise usage_error(f"regions[{name!r}]", wanted, got, "check its size and the order")
    return found


def check_swaps(
    swaps: str | Mapping[str, Swap] | None, attributes: tuple[str, ...], regions: dict[str, Tensor]
) -> dict[str, Swap]:
    """Return a function for each attribute whose part of the images is to be replaced.

    Raises:
        UsageError: another word than ``"regions"``, an unknown attribute, or no region to paste.
    """
    if swaps is None:
        return {}
    if isinstance(swaps, Mapping):
        for name, swap in swaps.items():
            if name not in attributes or not callable(swap):
                wanted = f"functions for attributes among {', '.join(attributes)}"
                raise usage_error("swaps", wanted, repr(name), "name an attribute that is probed")
        return dict(swaps)
    if swaps != "regions":
        raise usage_error("swaps", "'regions', functions by attribute or None", repr(swaps), "")
    pasted = {a: regions[a] for a in attributes if a in regions and regions[a].ndim == 2}
    if not pasted:
        wanted = "a region [height, width] with the name of an attribute"
        hint = "masks of single images do not fit others: pass functions"
        raise usage_error("swaps", wanted, "none", hint)
    return {name: _Paste(mask) for name, mask in pasted.items()}


class _Paste:
    """Takes the pixels of one region from the donors."""

    def __init__(self, mask: Tensor):
        self._mask = mask

    def __call__(self, images: Tensor, donors: Tensor) -> Tensor:
        return torch.where(self._mask.to(images.device), donors, images)


def draw_donors(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw, for each image of a batch, another one with another value of the attribute ``values`` ``[b]``.

    Returns:
        The images that have one, and their donors: int64 ``[m]`` each.
    """
    receivers, donors = [], []
    for value in values.unique():
        own, others = (values == value).nonzero().flatten(), (values != value).nonzero().flatten()
        if len(others):
            drawn = torch.randint(len(others), (len(own),), generator=generator)
            receivers.append(own)
            donors.append(others[drawn])
    nobody = torch.empty(0, dtype=torch.long)
    return torch.cat([nobody, *receivers]), torch.cat([nobody, *donors])
