"""Which few images to label, and the accuracy that these labels estimate without bias."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import usage_error
from .head_table import HeadTable
from .loader_batches import class_indices
from .row_scores import RowScores


@dataclass(frozen=True)
class LabelRequest:
    """Images to label.

    Attributes:
        indices: int64 ``[k]``, which images of the split, in the loader's order, all different.
        weights: float64 ``[k]``, one over the number of images times the probability that this image
            is drawn: the sum of ``weights * x[indices]`` is an unbiased estimate of the mean of x.
        split: the name of the split.
    """

    indices: Tensor
    weights: Tensor
    split: str


def suggest_labels(table: HeadTable, k: int, *, split: str = "ood", seed: int = 0) -> LabelRequest:
    """Draw k images to label for ``select_heads(table, criterion="few_labels")``.

    An image is drawn with a probability that grows with the disagreement of the choices of heads about
    it (one minus the sum over classes of the squared share of choices that predict the class). Half of
    the draw is spread evenly over all images, so no weight exceeds twice that of a plain random draw.
    The draw is systematic, without replacement.

    Args:
        table: its choices disagree; labels are not looked at.
        k: at most the number of images.
        split: of the table.
        seed: of the draw.

    Raises:
        UsageError: no such split, or k is not from 2 to the number of images.
    """
    found = table.split(split)
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= len(found):
        raise usage_error("k", f"a number of images from 2 to {len(found)}", k, "choose another")
    shares = torch.stack(
        [(found.predicted[table.choices] == c).double().mean(0) for c in range(table.classes)]
    )
    chances = _inclusion(1 - shares.square().sum(0), k)
    drawn = _systematic(chances, k, torch.Generator().manual_seed(seed))
    return LabelRequest(drawn, 1 / (len(found) * chances[drawn]), split)


def few_labels(
    table: HeadTable, *, request: LabelRequest, labels: Sequence[int] | Tensor
) -> RowScores:
    """Score by the accuracy on the whole split, estimated from the labels of a few of its images.

    The estimate is unbiased, and may exceed 1. Its error is that of a draw with replacement, which is
    an upper bound in the mean; 1.96 errors to both sides make a 95 % interval if k is not tiny.

    Args:
        table: the one that ``request`` was made from.
        request: from ``dvf.suggest_labels``.
        labels: class indices of the images ``request.indices``, in that order.

    Raises:
        UsageError: ``request`` is of another table, or the labels are not class indices, one per image.
    """
    found = table.split(request.split)
    if int(request.indices.max()) >= len(found):
        wanted = f"images of a split of {len(found)}"
        raise usage_error("request", wanted, int(request.indices.max()), "ask this table")
    given = class_indices(labels, len(request.indices))
    if not 0 <= int(given.min()) <= int(given.max()) < table.classes:
        got = f"{int(given.min())} to {int(given.max())}"
        wanted = f"class indices from 0 to {table.classes - 1}"
        raise usage_error("labels", wanted, got, "check the labels")
    hits = (found.predicted[:, request.indices] == given.long()).double()
    single = hits * request.weights * len(request.weights)  # each an estimate of the accuracy
    return RowScores(single.mean(1), single.std(1) / len(request.weights) ** 0.5)


def _inclusion(wish: Tensor, k: int) -> Tensor:
    """The probability of each image to be among the k: half even, half proportional to ``wish``, 1 at most."""
    total = float(wish.sum())
    share = torch.full_like(wish, 1 / len(wish))
    if total > 0:
        share = share / 2 + wish / total / 2
    sure = torch.zeros_like(wish, dtype=torch.bool)
    while True:
        left = k - int(sure.sum())
        chances = torch.where(sure, 1.0, share * left / share[~sure].sum().clamp(min=1e-300))
        above = (chances > 1) & ~sure
        if not above.any():
            return chances.clamp(max=1)
        sure |= above


def _systematic(chances: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw k different indices, index i with probability ``chances[i]``; these sum to k."""
    order = torch.randperm(len(chances), generator=generator)
    ends = chances[order].cumsum(0)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    points = start + torch.arange(k, dtype=torch.float64)
    places = torch.searchsorted(ends, points, right=True).clamp(max=len(chances) - 1)
    return order[places].sort().values
