"""Lay a cut-out over a background."""

import torch
from torch import Tensor

from ..errors import usage_error


def compose(foreground: Tensor, mask: Tensor, background: Tensor) -> Tensor:
    """Lay ``foreground`` over ``background``: uint8 ``[..., C, H, W]``, rounded to the nearest value.

    Args:
        foreground, background: uint8 ``[..., C, H, W]``.
        mask: uint8 ``[..., 1, H, W]``, the foreground's opacity: 0 shows the background alone, 255 hides it.

    Raises:
        UsageError: another dtype, or shapes that do not fit each other.
    """
    for name, x in (("foreground", foreground), ("mask", mask), ("background", background)):
        if x.dtype != torch.uint8:
            raise usage_error(name, "a tensor of dtype uint8", f"{x.dtype}", "scale it to 0..255")
    one = (*foreground.shape[:-3], 1, *foreground.shape[-2:])
    if foreground.shape != background.shape or mask.shape != one:
        shapes = ", ".join(str(list(x.shape)) for x in (foreground, mask, background))
        wanted = "[..., C, H, W], [..., 1, H, W] and [..., C, H, W]"
        raise usage_error("foreground, mask, background", wanted, shapes, "bring them to one size")
    opacity = mask.int()
    laid = opacity * foreground.int() + (255 - opacity) * background.int()
    return ((2 * laid + 255) // 510).to(torch.uint8)
