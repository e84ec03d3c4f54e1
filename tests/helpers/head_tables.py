"""Head tables without a model: two layers' worth of predictions made up from logits."""

import torch
from torch import Tensor

from diversevit_fast.heads.head_table import HeadTable, SplitPredictions


def split_of(
    logits: Tensor, labels: Tensor | None = None, groups: Tensor | None = None
) -> SplitPredictions:
    """The predictions of logits ``[R, n, classes]``."""
    p = logits.double().softmax(-1)
    return SplitPredictions(
        predicted=logits.argmax(-1),
        confidence=p.amax(-1),
        entropy=(-(p * p.log()).sum(-1)).float(),
        logsumexp=logits.double().logsumexp(-1).float(),
        fourth_powers=(p**4).sum(-1).float(),
        labels=labels,
        groups=groups,
    )


def logits_for(predicted: Tensor, classes: int = 2, sure: float = 2.0) -> Tensor:
    """Logits ``[R, n, classes]`` whose largest is at the predicted class."""
    return sure * torch.nn.functional.one_hot(predicted, classes).double()


def table_of(splits: dict[str, SplitPredictions], heads: int, classes: int = 2) -> HeadTable:
    """A table of single heads; the first row of every split is the whole model."""
    names = {str(g) for s in splits.values() if s.groups is not None for g in s.groups.tolist()}
    kept = ({0: list(range(heads))}, *({0: [head]} for head in range(heads)))
    return HeadTable(kept, {0: heads}, classes, "single", splits, tuple(sorted(names)))


def shortcut_split(
    n: int, correlation: float, seed: int, core: float = 0.8, noise: float = 0.0
) -> SplitPredictions:
    """Predictions of a whole model and head 0 that follow a shortcut, and of head 1 that reads the label.

    The shortcut agrees with the label in ``correlation`` of the images, head 1 in ``core`` of them,
    whatever the shortcut; head 2 is constant. ``noise`` of the labels are wrong.
    """
    g = torch.Generator().manual_seed(seed)

    def flipped(labels: Tensor, chance: float) -> Tensor:
        return labels ^ (torch.rand(n, generator=g) < chance).long()

    label = torch.arange(n) % 2
    shortcut = flipped(label, 1 - correlation)
    head = flipped(label, 1 - core)
    rows = torch.stack([shortcut, shortcut, head, torch.zeros_like(label)])
    return split_of(logits_for(rows), flipped(label, noise), 2 * label + shortcut)
