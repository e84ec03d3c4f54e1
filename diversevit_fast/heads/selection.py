"""Choose heads on validation data: those of a trained model that follow the robust feature."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

from torch import Tensor, nn

from ..attachment.attention_modules import AttentionLayer, choose_layers
from ..attachment.indices import Integers
from ..attachment.parallel import unwrap
from ..errors import usage_error
from ..ops.checks import check_choice
from .candidates import Kept, all_combinations, single_heads
from .criteria import scores_of
from .evaluation import Runner
from .head_table import HeadTable
from .loader_batches import Batch, class_indices, group_names
from .scores import SCORES, CallableScore, ThresholdedConfidence, WorstGroup

Score = (
    Literal["accuracy", "worst_group", "confidence", "atc"]
    | Callable[[Tensor, Tensor, Tensor | None], float]
)
CriterionName = Literal[
    "accuracy",
    "worst_group",
    "group_mean",
    "mistakes",
    "agreement_drop",
    "few_labels",
    "mano",
    "confidence",
    "atc",
]


@dataclass(frozen=True)
class HeadChoice:
    """One candidate: the heads that stay in each layer, and their score on the validation data.

    ``error`` is the score's standard error, where a criterion of a ``HeadTable`` knows it.
    """

    kept: dict[int, list[int]]
    score: float
    error: float | None = None


@overload
def select_heads(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: str | Integers = "last",
    score: Score = "accuracy",
    search: str = "single",
    reference_loader: Iterable[Any] | None = None,
) -> list[HeadChoice]: ...


@overload
def select_heads(
    model: HeadTable,
    *,
    criterion: CriterionName | Callable[[HeadTable], Any],
    **options: Any,
) -> list[HeadChoice]: ...


def select_heads(
    model: nn.Module | HeadTable,
    loader: Iterable[Any] | None = None,
    *,
    layers: str | Integers = "last",
    score: Score = "accuracy",
    search: str = "single",
    reference_loader: Iterable[Any] | None = None,
    criterion: CriterionName | Callable[[HeadTable], Any] | None = None,
    **options: Any,
) -> list[HeadChoice]:
    """Rank choices of heads by the model's score with only these heads, or by a criterion of a table.

    The paper's rule is ``layers="last"``, ``search="single"`` and accuracy on labelled out-of-distribution
    validation data. The model is evaluated in eval mode and then set back to its mode; its parameters do
    not change. Each batch goes through the whole model once for each chosen layer (once in total with
    ``"exhaustive"``). Every further candidate only computes what follows the first attention it changes
    (see ``PrefixCache`` for what cannot be cached).

    Args:
        model: a classifier, images -> logits ``[B, classes]`` or an object with ``.logits``, whose chosen
            layers' heads can be masked (``dvf.supported``). Or the ``dvf.HeadTable`` of one, with
            ``criterion`` and its options; what else is below is then given to ``dvf.head_table``.
        loader: batches ``(images, labels)`` or ``(images, labels, groups)``, or dictionaries, as
            transformers' collators make them: ``"labels"`` (or ``"label"``), ``"groups"`` (or
            ``"group"``), and what the model is to be given by name; of other entries a model that takes
            none of the names is given the only tensor. Labels are class indices; groups are
            numbers, for ``"worst_group"`` also strings. An iterator, which runs once, does for every
            search but ``"greedy"``.
        layers: the layers to choose in: ``"last"``, ``"all"`` or indices, as a list, a tensor or the like.
        score: larger is better.
            With labels: ``"accuracy"``; ``"worst_group"``, the accuracy of the worst group (needs groups);
            or a callable ``(logits [n, classes], labels [n], groups [n] or None) -> float``, for which the
            logits of every candidate are kept.
            Without: the batches may be images alone, and labels are not looked at.
            ``"confidence"``: the mean over images of the largest softmax probability.
            ``"atc"``: average thresholded confidence, an estimate of the accuracy on ``loader`` (Garg et al.,
            ICLR 2022, arXiv 2201.04234): the fraction of its images whose largest probability is at
            least t, where t is such that as large a fraction of ``reference_loader`` is below t as
            the same heads get wrong there. Both trust the model's own confidence, which heads
            that follow a spurious feature have too: measured on such models, they chose no better
            than not pruning (docs/science/selection.md). Prefer labels, however few, or
            a criterion of a table.
        search: ``"single"``: each head of each layer alone, other layers whole. ``"greedy"``: start from
            all heads, drop the head whose loss hurts least, until one is left in each layer; every
            step is a candidate and runs through the loader once. ``"exhaustive"``: every
            combination, at most 4096.
        reference_loader: for ``"atc"``: labelled batches, as ``loader``'s, of data like the training data
            but held out.
        criterion: of a table, the name of one of ``dvf.head_criteria()``, which say what they need and
            when they fail; or a function that takes the table and returns a number for each
            of ``table.kept``, larger is better, NaN to leave it out.
        options: of the criterion, such as ``reference="all"`` of ``"mistakes"``.

    Returns:
        The candidates, best first; ties keep more heads, then lower indices.

    Raises:
        UsageError: wrong arguments, an empty loader, batches of another kind, an iterator where several runs
            are needed, labels missing, out of range or no numbers, missing groups, logits that are
            not finite, a reference loader with a score that has no use for it, too many
            combinations, or a table without what the criterion needs.
        UnsupportedError: heads that cannot be seen, or a model that calls its modules in another order
            when run again.
    """
    if isinstance(model, HeadTable):
        if loader is not None or reference_loader is not None or (layers, search) != _DEFAULTS:
            hint = "give loaders, layers and search to dvf.head_table"
            raise usage_error("criterion", "a table and a criterion", "more", hint)
        return _of_table(model, criterion, options)
    if criterion is not None or options:
        got = ", ".join([*(["criterion"] if criterion is not None else []), *options])
        hint = "make a table with dvf.head_table first"
        raise usage_error("model", f"a HeadTable to go with {got}", type(model).__name__, hint)
    check_choice("search", search, ("single", "greedy", "exhaustive"))
    if not callable(score):
        check_choice("score", score, tuple(SCORES))
    network = unwrap(model)
    chosen = choose_layers(network, layers)
    evaluate = _Evaluation(network, chosen, loader, reference_loader, score, search == "greedy")
    if search == "greedy":
        choices = _greedy(chosen, evaluate)
    else:
        choices = evaluate(
            single_heads(chosen) if search == "single" else [all_combinations(chosen)]
        )
    return _ranked(choices)


_DEFAULTS = ("last", "single")


def _ranked(choices: list[HeadChoice]) -> list[HeadChoice]:
    return sorted(choices, key=lambda c: (-c.score, -sum(map(len, c.kept.values()))))


def _of_table(table: HeadTable, criterion: Any, options: dict[str, Any]) -> list[HeadChoice]:
    scores = scores_of(table, criterion, options)
    values = scores.values.tolist()
    errors = [None] * len(values) if scores.errors is None else scores.errors.tolist()
    choices = [
        HeadChoice(table.kept[row], values[row], errors[row])
        for row in table.choices
        if not math.isnan(values[row])
    ]
    if not choices:
        hint = "try another one"
        raise usage_error("criterion", "one that scores a choice of heads", "NaN for all", hint)
    return _ranked(choices)


def _greedy(layers: Sequence[AttentionLayer], evaluate: "_Evaluation") -> list[HeadChoice]:
    kept = {layer.index: list(range(layer.num_heads)) for layer in layers}
    path: list[HeadChoice] = []
    while not path or any(len(heads) > 1 for heads in kept.values()):
        steps = [
            [{**kept, index: [h for h in heads if h != dropped]} for dropped in heads]
            for index, heads in kept.items()
            if len(heads) > 1
        ]
        if path:
            found = evaluate(steps)
        else:  # the start (all heads) is scored in the same run of the loader
            whole, *others = steps or [[]]
            start, *found = evaluate([[kept, *whole], *others])
            path.append(start)
        if found:
            path.append(max(found, key=lambda choice: choice.score))
            kept = path[-1].kept
    return path


class _Evaluation:
    """Scores candidates, all of them in one run of the loader; between batches only tallies are kept."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[AttentionLayer],
        loader: Iterable[Any] | None,
        reference: Iterable[Any] | None,
        score: Score,
        several: bool,
    ):
        self._loader, self._reference = loader, reference
        self._tally: Any = partial(CallableScore, score) if callable(score) else SCORES[score]
        self._labelled = callable(score) or score in ("accuracy", "worst_group")
        self._grouped = callable(score) or score == "worst_group"
        if (reference is not None) != (self._tally is ThresholdedConfidence):
            wanted, got = (
                ("labelled in-distribution data for score='atc'", "none")
                if reference is None
                else (f"nothing for score={score!r}", "a loader")
            )
            raise usage_error("reference_loader", wanted, got, "only 'atc' compares with it")
        for name, data in (("loader", loader), ("reference_loader", reference)):
            if several and isinstance(data, Iterator):
                hint = "pass a list or a DataLoader"
                wanted = "data that can be run through again for search='greedy'"
                raise usage_error(name, wanted, "an iterator, which runs once", hint)
        self._runner = Runner(model, layers)

    def __call__(self, groups: Sequence[Sequence[Kept]]) -> list[HeadChoice]:
        """Score the candidates of every group; returns them in order."""
        tallies = [[self._tally() for _ in group] for group in groups]
        with self._runner.evaluating():
            run = self._runner.predictions
            for i, j, predictions in run("loader", self._loader, groups, self._answers):
                tallies[i][j].add(predictions)
            if self._reference is not None:
                name = "reference_loader"
                for i, j, predictions in run(name, self._reference, groups, self._answers):
                    tallies[i][j].refer(predictions)
        return [
            HeadChoice(kept, tally.value())
            for group, scored in zip(groups, tallies, strict=True)
            for kept, tally in zip(group, scored, strict=True)
        ]

    def _answers(self, name: str, batch: Batch) -> tuple[Tensor | None, Tensor | list[str] | None]:
        """The labels and groups of one batch, where the score needs them."""
        if name == "loader" and not self._labelled:
            return None, None
        if batch.labels is None:
            wanted = "labels: batches (images, labels), or dictionaries with 'labels'"
            raise usage_error(name, wanted, "images alone", "only 'confidence' needs no labels")
        labels = class_indices(batch.labels, batch.size)
        if not self._grouped or batch.groups is None:
            return labels, None
        return labels, group_names(batch.groups, batch.size, named=self._tally is WorstGroup)
