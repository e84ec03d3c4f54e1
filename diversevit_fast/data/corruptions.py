"""Common corruptions of images at five severities (Hendrycks and Dietterich, arXiv 1903.12261).

The corruptions are those of the package ``imagecorruptions`` (Michaelis et al., arXiv 1907.07484, whose severities are
ImageNet-C's), kept by its maintainers for today's Python as ``imagecorruptions-imaug``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..errors import require, usage_error

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # pixels
_SEEDED = ("impulse_noise", "glass_blur")  # take a seed; the others use NumPy's global generator


def corrupt(images: Tensor, corruption: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupt images, each by draws of its own; equal seeds corrupt alike.

    Args:
        images: uint8 ``[n, 3, H, W]``, at least 32 x 32 pixels.
        corruption: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: image i is corrupted by the draws of ``seed + i``; below 2**31.

    Returns:
        uint8 ``[n, 3, H, W]``.

    Raises:
        UsageError: a bad argument, or ``imagecorruptions`` is not installed.
    """
    if corruption not in CORRUPTIONS:
        wanted = f"one of {', '.join(CORRUPTIONS)}"
        raise usage_error("corruption", wanted, repr(corruption), "check the spelling")
    if severity not in SEVERITIES:
        raise usage_error("severity", "1, 2, 3, 4 or 5", repr(severity), "pick one of these")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        got = f"{images.dtype} {list(images.shape)}"
        raise usage_error("images", "uint8 [n, 3, H, W]", got, "scale them to 0..255")
    if min(images.shape[2:]) < SMALLEST:
        wanted = f"images of at least {SMALLEST} x {SMALLEST} pixels"
        raise usage_error("images", wanted, list(images.shape[2:]), "the corruptions need as many")
    package = require("imagecorruptions", extra="corruptions")
    corrupted = torch.empty_like(images)
    with _numpy_seeds():
        for i, image in enumerate(images):
            number = seed + i
            np.random.seed(number)
            options = {"seed": number} if corruption in _SEEDED else {}
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            changed = package.corrupt(pixels, severity, corruption, **options)
            corrupted[i] = torch.tensor(changed).permute(2, 0, 1)
    return corrupted


@contextmanager
def _numpy_seeds() -> Iterator[None]:
    """Give NumPy's global generator back as it was."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
