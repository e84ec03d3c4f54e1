"""Accuracies of a classifier on data with groups: four different averages are in use, each under its name."""

from dataclasses import dataclass

from torch import Tensor

from ..errors import usage_error


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracies over groups, each from 0 to 1.

    Attributes:
        groups: accuracy of each group ``[num_groups]``, float64; NaN of one without images.
        counts: images of each group ``[num_groups]``.
        worst_group: the lowest of them.
        group_mean: their unweighted mean (SubpopBench: "adjusted accuracy").
        adjusted_average: their mean weighted by the groups' shares of the training data (group_DRO and WILDS:
            "adj_acc_avg"); None without those.
        average: the share of all images (DFR's mean).
    """

    groups: Tensor
    counts: Tensor
    worst_group: float
    group_mean: float
    adjusted_average: float | None
    average: float


def group_accuracy(
    predictions: Tensor, labels: Tensor, groups: Tensor, train_counts: Tensor | None = None
) -> GroupAccuracy:
    """Return accuracy by group and its averages.

    Args:
        predictions: predicted classes ``[n]``, or logits ``[n, classes]``.
        labels: int64 ``[n]``.
        groups: int64 ``[n]``, numbered from 0.
        train_counts: images of each group in the training data ``[num_groups]`` (``GroupDataset.counts``); it also
            says how many groups there are.

    Raises:
        UsageError: no image, lengths that differ, or a group that ``train_counts`` does not know.
    """
    if predictions.ndim == 2:
        predictions = predictions.argmax(-1)
    if not (len(predictions) == len(labels) == len(groups) and predictions.ndim == 1):
        got = f"{list(predictions.shape)}, {list(labels.shape)} and {list(groups.shape)}"
        raise usage_error("predictions, labels, groups", "one of each per image", got, "match them")
    if not len(labels):
        raise usage_error("labels", "at least one image", "none", "pass the whole split")
    known = 0 if train_counts is None else len(train_counts)
    if train_counts is not None and int(groups.max()) >= known:
        hint = "pass the counts of the training set of the same groups"
        raise usage_error("train_counts", f"{int(groups.max()) + 1} groups", known, hint)
    groups = groups.cpu()
    hits = (predictions.cpu() == labels.cpu()).double()
    counts = groups.bincount(minlength=known)
    by_group = groups.bincount(hits, minlength=known) / counts
    there = counts > 0
    adjusted = None
    if train_counts is not None:
        weights = train_counts.cpu().double() * there
        adjusted = float((weights * by_group.nan_to_num(0.0)).sum() / weights.sum())
    return GroupAccuracy(
        by_group,
        counts,
        float(by_group[there].min()),
        float(by_group[there].mean()),
        adjusted,
        float(hits.mean()),
    )
