"""Criteria by which ``dvf.select_heads(table, criterion=...)`` ranks choices of heads; a new one goes into ``_ALL``.

A criterion is a function of a ``HeadTable`` that gives every row of it a score, larger is better. NaN
leaves a choice out.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import usage_error
from ..ops.checks import check_choice
from .few_labels import few_labels
from .head_table import HeadTable, SplitPredictions
from .row_scores import RowScores

FEWEST_MISTAKES, FEW_MISTAKES = 30, 100
SMALLEST_CLASS = 0.05  # of a choice's predictions, below which agreement_drop leaves it out


@dataclass(frozen=True)
class Criterion:
    """What a named criterion needs and computes.

    Attributes:
        name: what ``select_heads`` calls it.
        needs: the data, in words.
        formula: the score.
        source: where it is from.
        failure: when it is known to choose wrong.
        score: ``(table, **options) -> RowScores``.
    """

    name: str
    needs: str
    formula: str
    source: str
    failure: str
    score: Callable[..., RowScores]

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(inspect.signature(self.score).parameters)[1:]


def head_criteria() -> dict[str, Criterion]:
    """The criteria of ``dvf.select_heads(table, criterion=...)``, by name."""
    return dict(_ALL)


def scores_of(table: HeadTable, criterion: Any, options: Mapping[str, Any]) -> RowScores:
    """Score every row of ``table``.

    Args:
        criterion: a name, or a function that takes the table and returns a number for every row.
        options: of the criterion.

    Raises:
        UsageError: no such criterion or option; data that it needs are missing; other than a number
            for every row.
    """
    if callable(criterion):
        if options:
            got = ", ".join(options)
            hint = "bind them with functools.partial"
            raise usage_error("options", "none for a function of your own", got, hint)
        values = torch.as_tensor(criterion(table), dtype=torch.float64).cpu()
        if values.shape != (len(table.kept),):
            wanted = f"{len(table.kept)} numbers, one for each of table.kept"
            raise usage_error("criterion", wanted, list(values.shape), "return one for each")
        return RowScores(values)
    check_choice("criterion", criterion, tuple(_ALL))
    known = _ALL[criterion].options
    if unknown := [name for name in options if name not in known]:
        wanted = f"options of {criterion!r}: {', '.join(known)}"
        raise usage_error("options", wanted, ", ".join(unknown), "leave it out")
    return _ALL[criterion].score(table, **options)


def accuracy(table: HeadTable, *, split: str = "ood") -> RowScores:
    """Score by the accuracy on ``split``."""
    return _means(table.split(split).hits.double())


def worst_group(table: HeadTable, *, split: str = "ood") -> RowScores:
    """Score by the accuracy of the group of ``split`` in which it is lowest."""
    found = _by_group(table.split(split))
    lowest = found.values.argmin(0, keepdim=True)
    return RowScores(*(x.gather(0, lowest)[0] for x in found))


def group_mean(table: HeadTable, *, split: str = "ood") -> RowScores:
    """Score by the mean over the groups of ``split`` of the accuracy in the group."""
    found = _by_group(table.split(split))
    return RowScores(found.values.mean(0), found.errors.norm(dim=0) / len(found.errors))


def mistakes(
    table: HeadTable,
    *,
    id_split: str = "id",
    reference: str = "best",
    fewest: int = FEWEST_MISTAKES,
) -> RowScores:
    """Score by the mean of the accuracies where a reference is right and where it is wrong, on ID data.

    The reference follows what is easy and common in the data, often the shortcut; where it is wrong,
    the shortcut probably disagrees with the label. The score estimates the accuracy on data where both
    are as frequent.

    Args:
        table: with labels on ``id_split``.
        id_split: held-out data like the training data. On the training data themselves a model that
            fits them makes no mistakes.
        reference: ``"best"``: the single head with the highest accuracy on ``id_split``; ``"all"``:
            the whole model.
        fewest: refuse below so many mistakes. Below 100 there is a warning with the standard error.

    Raises:
        UsageError: fewer mistakes, or fewer right answers.
    """
    check_choice("reference", reference, ("best", "all"))
    hits = table.split(id_split).hits
    if reference == "best":
        singles = table.singles
        row = singles[int(hits[singles].double().mean(1).argmax())]
    else:
        row = 0
    right = hits[row]
    wrong_count = int((~right).sum())
    fewer = min(wrong_count, int(right.sum()))
    if fewer < max(fewest, 1):
        what = "mistakes" if fewer == wrong_count else "right answers"
        wanted = f"at least {max(fewest, 1)} {what} of the reference (heads {table.kept[row]})"
        hint = "give more held-out images, or an earlier checkpoint"
        raise usage_error(f"table[{id_split!r}]", wanted, fewer, hint)
    parts = [_means(hits[:, part].double()) for part in (right, ~right)]
    scores = RowScores(
        (parts[0].values + parts[1].values) / 2,
        torch.hypot(_known(parts[0]), _known(parts[1])) / 2,
    )
    if fewer < FEW_MISTAKES:
        best = table.choices[int(scores.values[table.choices].argmax())]
        warnings.warn(
            f"mistakes: the reference makes {wrong_count} in {len(right)} images, so the score of the "
            f"best choice has a standard error of {_known(scores)[best]:.3f}; more held-out "
            "images make it smaller",
            stacklevel=5,
        )
    return scores


def agreement_drop(table: HeadTable, *, id_split: str = "id", ood_split: str = "ood") -> RowScores:
    """Score by how much less a choice agrees with the whole model on ``ood_split`` than on ``id_split``.

    Needs no labels. The whole model is taken to follow the shortcut: heads that agree with it where
    shortcut and robust feature agree, and disagree elsewhere, follow the robust feature. A choice is left
    out if on either split one class makes up less than 5 % of its predictions.
    """
    agreement, constant = [], torch.zeros(len(table.kept), dtype=torch.bool)
    for name in (id_split, ood_split):
        split = table.split(name)
        agreement.append(_means((split.predicted == split.predicted[0]).double()))
        shares = _class_shares(split, table.classes)
        constant |= (shares < SMALLEST_CLASS).any(1)
    before, after = agreement
    drop = (before.values - after.values).masked_fill(constant, torch.nan)
    return RowScores(drop, torch.hypot(_known(before), _known(after)))


def mano(table: HeadTable, *, split: str = "ood") -> RowScores:
    """Score by MaNo: the mean over images and classes of p^4, to the power 1/4; p is the softmax.

    Larger means that the model is surer of itself; the authors' calibrated alternative to the softmax
    needs the logits and is not computed here. Measured on models with a shortcut
    (docs/science/selection.md), it chose no better than not pruning at all.
    """
    powers = table.split(split).fourth_powers.double()
    return RowScores((powers.mean(1) / table.classes) ** 0.25)


def confidence(table: HeadTable, *, split: str = "ood") -> RowScores:
    """Score by the mean of the largest probability, without labels.

    Measured on models with a shortcut (docs/science/selection.md), it chose no better than not pruning
    at all.
    """
    return _means(table.split(split).confidence.double())


def atc(table: HeadTable, *, id_split: str = "id", ood_split: str = "ood") -> RowScores:
    """Score by average thresholded confidence, an estimate of the accuracy on ``ood_split`` without labels.

    The fraction of images whose largest probability is at least t, where as large a fraction of
    ``id_split`` is below t as the same heads get wrong there. Measured on models with a shortcut
    (docs/science/selection.md), it chose as accuracy on in-distribution data does: heads of the
    shortcut, no better than not pruning at all.
    """
    reference, hits = table.split(id_split), table.split(id_split).hits
    ascending = reference.confidence.sort(dim=1).values
    wrong = (~hits).sum(1, keepdim=True)
    never = ascending.new_full((len(ascending), 1), torch.inf)  # all are wrong
    threshold = torch.cat([ascending, never], dim=1).gather(1, wrong)
    return _means((table.split(ood_split).confidence >= threshold).double())


class _Means(NamedTuple):
    values: Tensor  # [G, R]
    errors: Tensor  # [G, R]


def _by_group(split: SplitPredictions) -> _Means:
    hits = split.hits.double()
    if split.groups is None:
        hint = "let the loader yield (images, labels, groups)"
        raise usage_error("table", "a split with groups", "none", hint)
    found = [_means(hits[:, split.groups == group]) for group in split.groups.unique()]
    return _Means(torch.stack([x.values for x in found]), torch.stack([_known(x) for x in found]))


def _means(values: Tensor) -> RowScores:
    """The mean of each row of ``[R, n]``, with its standard error."""
    count = values.shape[1]
    return RowScores(values.mean(1), values.std(1, correction=0) / count**0.5)


def _known(scores: RowScores) -> Tensor:
    assert scores.errors is not None
    return scores.errors


def _class_shares(split: SplitPredictions, classes: int) -> Tensor:
    """The fraction of the predictions that each class has, ``[R, classes]``."""
    counts = torch.zeros(len(split.predicted), classes, dtype=torch.float64)
    ones = torch.ones_like(split.predicted, dtype=torch.float64)
    return counts.scatter_add_(1, split.predicted, ones) / len(split)


_ALL = {
    c.name: c
    for c in (
        Criterion(
            "accuracy",
            "labels of split (OOD; the paper's rule)",
            "accuracy on the split",
            "arXiv 2308.16274",
            "labels of in-distribution data: heads that follow the shortcut are the most accurate there",
            accuracy,
        ),
        Criterion(
            "worst_group",
            "labels and groups of split (OOD)",
            "lowest accuracy of a group",
            "arXiv 1911.08731",
            "small groups: the minimum is noisy",
            worst_group,
        ),
        Criterion(
            "group_mean",
            "labels and groups of split (OOD or ID)",
            "mean over groups of the accuracy",
            "arXiv 2204.02937 (group-balanced data)",
            "a shortcut that the groups do not name",
            group_mean,
        ),
        Criterion(
            "mistakes",
            "labels of ID data, held out",
            "(accuracy where a reference is right + accuracy where it is wrong) / 2",
            "after JTT, arXiv 2107.09044: mistakes stand for the minority groups",
            "mistakes that are hard images; fewer than 30; no shift: it costs accuracy",
            mistakes,
        ),
        Criterion(
            "agreement_drop",
            "ID images, held out, and OOD images; no label",
            "agreement with the whole model on ID - on OOD",
            "after agreement-on-the-line, arXiv 2206.13089, turned round",
            "a whole model that is robust already: the rule then finds the heads of the shortcut; "
            "no shift: a drop below two errors may be noise",
            agreement_drop,
        ),
        Criterion(
            "few_labels",
            "k labels of OOD images that suggest_labels names",
            "mean of hit x weight over the labelled images",
            "arXiv 2103.05331 (active testing: weights against the bias of the choice)",
            "few labels: look at the error",
            few_labels,
        ),
        Criterion(
            "mano",
            "OOD images; no label",
            "(mean over images and classes of p^4)^(1/4)",
            "arXiv 2405.18979, with the softmax",
            "heads that are surest of the shortcut",
            mano,
        ),
        Criterion(
            "confidence",
            "OOD images; no label",
            "mean of the largest probability",
            "arXiv 1610.02136",
            "heads that are surest of the shortcut",
            confidence,
        ),
        Criterion(
            "atc",
            "labels of ID data, held out, and OOD images",
            "share of OOD images as confident as the right share of ID images",
            "arXiv 2201.04234",
            "skill on ID data that does not carry over: the estimate follows ID accuracy",
            atc,
        ),
    )
}
