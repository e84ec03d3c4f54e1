"""Evaluate a model with all heads and with each head alone, and measure the heads' similarity."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import batches
from ..heads.evaluation import evaluating
from ..penalty.head_diversity import HeadDiversity
from .metrics import EVALUATED, Row
from .models import head_logits

_BATCH = 256  # evaluation keeps no graph, so larger than a training batch


def evaluate_splits(
    model: Any, splits: Mapping[str, Any], rank: int = 0, ranks: int = 1
) -> dict[str, list[Row]]:
    """Return rows by evaluation split: all heads, then each head of the last layer alone.

    Of ``ranks`` that divide the splits among them, ``rank`` takes every ``ranks``-th.
    """
    return {split: evaluate(model, splits[split], split) for split in EVALUATED[rank::ranks]}


@torch.no_grad()
def evaluate(model: Any, dataset: Any, split: str, *, each_head: bool = True) -> list[Row]:
    """Return rows ``{"split", "heads", "accuracy", "worst_group", "loss"}``, one per choice of heads.

    Args:
        model: what an ``Architecture`` builds or a weight file holds; it is evaluated in evaluation mode.
        dataset: a data set of ``diversevit_fast.data``, or a split of tokens for a model of the last block.
        split: the name that goes into the rows.
        each_head: also each head of the last layer alone; without, the forward is the model's own.
    """
    with evaluating(model):
        return _evaluate(model, dataset, split, each_head)


def _evaluate(model: Any, dataset: Any, split: str, each_head: bool) -> list[Row]:
    device = next(model.parameters()).device
    hits: list[Tensor] = []
    losses: list[Tensor] = []
    groups: list[Tensor] = []
    for images, labels, group in batches(dataset, _BATCH):
        images = images.to(device)
        logits = head_logits(model, images) if each_head else model(images)[None]
        logits = logits.cpu()  # [1 + H, b, classes]
        hits.append(logits.argmax(-1) == labels)
        expanded = labels.expand(logits.shape[:2])
        losses.append(F.cross_entropy(logits.transpose(1, 2), expanded, reduction="none"))
        groups.append(group)
    hit, loss, group = torch.cat(hits, 1).double(), torch.cat(losses, 1).double(), torch.cat(groups)
    members = F.one_hot(group, len(dataset.group_names)).double()  # [n, G]
    counts = members.sum(0)
    per_group = (hit @ members)[:, counts > 0] / counts[counts > 0]
    return [
        {
            "split": split,
            "heads": "all" if i == 0 else str(i - 1),
            "accuracy": hit[i].mean().item(),
            "worst_group": per_group[i].min().item(),
            "loss": loss[i].mean().item(),
        }
        for i in range(len(hit))
    ]


def likeness(model: nn.Module, diversity: HeadDiversity, images: Tensor) -> tuple[float, list]:
    """Return the penalty on ``images`` and the mean absolute cosines between the last layer's heads.

    Args:
        model: the model that ``diversity`` was made for.
        images: ``[B, C, height, width]`` on the model's device.

    Returns:
        The penalty, and an H x H nested list: the mean over samples and over the tokens that have a
        gradient of the absolute cosine of every pair of heads.
    """
    with torch.enable_grad(), evaluating(model):
        with diversity:
            logits = model(images)
        penalty = diversity.penalty(logits).item()
    cosines = diversity.cosines[-1].flatten(0, -3).abs().double()  # [B N, H, H]
    reached = cosines.diagonal(dim1=-2, dim2=-1).amax(-1) > 0
    return penalty, cosines[reached].mean(0).tolist()
