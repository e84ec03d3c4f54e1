"""Wrong labels: a random part of a split's labels is replaced by those of other classes."""

from numbers import Real

import torch
from torch import Tensor

from ..errors import usage_error


def noisy_labels(
    labels: Tensor, fraction: float, classes: int, generator: torch.Generator
) -> Tensor:
    """Replace each label, with probability ``fraction``, by another class, all others being as likely.

    Args:
        labels: int64 ``[n]``.
        fraction: from 0 to 1.
        classes: how many there are; of one class, labels stay as they are.
        generator: is advanced.

    Returns:
        int64 ``[n]``, new.
    """
    wrong = torch.rand(len(labels), generator=generator) < fraction
    others = labels + torch.randint(1, max(classes, 2), (len(labels),), generator=generator)
    return torch.where(wrong, others % classes, labels)


def check_label_noise(fraction: float | None) -> None:
    """Check a fraction of wrong labels.

    Raises:
        UsageError: it is neither None nor a number from 0 to 1.
    """
    number = isinstance(fraction, Real) and not isinstance(fraction, bool)
    if fraction is not None and not (number and 0 <= fraction <= 1):
        raise usage_error("label_noise", "a number from 0 to 1", repr(fraction), "try 0.1")
