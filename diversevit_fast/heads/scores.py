"""Scores of a choice of heads on validation data, larger is better; a new one is a class in ``SCORES``.

A score is a tally: ``add(predictions)`` takes a batch, ``value()`` gives the result of all batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import usage_error


class Predictions(NamedTuple):
    """The logits of one batch with its labels and groups, on the CPU."""

    logits: Tensor  # [b, classes]
    labels: Tensor | None  # [b]
    groups: Tensor | list[str] | None  # [b]


class Accuracy:
    """The fraction of images whose largest logit is the label's."""

    def __init__(self) -> None:
        self._hits = self._seen = 0

    def add(self, batch: Predictions) -> None:
        self._hits += int((batch.logits.argmax(-1) == batch.labels).sum())
        self._seen += len(batch.logits)

    def value(self) -> float:
        return self._hits / self._seen


class WorstGroup:
    """The accuracy of the group in which it is lowest."""

    def __init__(self) -> None:
        self._groups: dict[Any, Accuracy] = {}

    def add(self, batch: Predictions) -> None:
        if batch.groups is None or batch.labels is None:
            hint = "let the loader yield (images, labels, groups)"
            raise usage_error("loader", "groups for score='worst_group'", "none", hint)
        names = batch.groups if isinstance(batch.groups, list) else batch.groups.tolist()
        for group in dict.fromkeys(names):
            here = torch.tensor([name == group for name in names])
            tally = self._groups.setdefault(group, Accuracy())
            tally.add(Predictions(batch.logits[here], batch.labels[here], None))

    def value(self) -> float:
        return min(tally.value() for tally in self._groups.values())


class Confidence:
    """The mean over images of the largest probability; needs no labels."""

    def __init__(self) -> None:
        self._confidences: list[Tensor] = []

    def add(self, batch: Predictions) -> None:
        self._confidences.append(_confidence(batch.logits))

    def value(self) -> float:
        return float(torch.cat(self._confidences).mean())


class ThresholdedConfidence(Confidence):
    """Average thresholded confidence: an estimate of the accuracy without labels (arXiv 2201.04234)."""

    def __init__(self) -> None:
        super().__init__()
        self._references: list[Tensor] = []
        self._wrong = 0

    def refer(self, batch: Predictions) -> None:
        """Add a batch of the labelled reference data."""
        self._references.append(_confidence(batch.logits))
        self._wrong += int((batch.logits.argmax(-1) != batch.labels).sum())

    def value(self) -> float:
        ascending = torch.cat(self._references).sort().values
        if self._wrong == len(ascending):  # all are wrong: no confidence is high enough
            return 0.0
        threshold = ascending[self._wrong]  # as many are below as are wrong
        return float((torch.cat(self._confidences) >= threshold).double().mean())


class CallableScore:
    """The score of a user's function, which takes all logits, labels and groups at once."""

    def __init__(self, score: Callable[[Tensor, Tensor, Tensor | None], float]):
        self._score, self._batches = score, []

    def add(self, batch: Predictions) -> None:
        self._batches.append(batch)

    def value(self) -> float:
        logits, labels, groups = zip(*self._batches, strict=True)
        joined = None if any(g is None for g in groups) else torch.cat(groups)
        return float(self._score(torch.cat(logits), torch.cat(labels), joined))


def _confidence(logits: Tensor) -> Tensor:
    """The largest probability of each image."""
    return logits.double().softmax(-1).amax(-1)


SCORES = {
    "accuracy": Accuracy,
    "worst_group": WorstGroup,
    "confidence": Confidence,
    "atc": ThresholdedConfidence,
}
