"""Choose heads on validation data: those of a trained model that follow the robust feature."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attachment.attention_modules import AttentionLayer, choose_layers
from ..attachment.indices import Integers
from ..attachment.parallel import unwrap
from ..errors import usage_error
from ..ops.checks import check_choice
from .loader_batches import Batch, class_indices, group_names, split_batch
from .prefix_cache import PrefixCache
from .scores import SCORES, CallableScore, Predictions, ThresholdedConfidence, WorstGroup

Score = (
    Literal["accuracy", "worst_group", "confidence", "atc"]
    | Callable[[Tensor, Tensor, Tensor | None], float]
)
Kept = dict[int, list[int]]
MAX_CANDIDATES = 4096


@dataclass(frozen=True)
class HeadChoice:
    """One candidate: the heads that stay in each layer, and their score on the validation data."""

    kept: dict[int, list[int]]
    score: float


def select_heads(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: str | Integers = "last",
    score: Score = "accuracy",
    search: str = "single",
    reference_loader: Iterable[Any] | None = None,
) -> list[HeadChoice]:
    """Rank choices of heads by the model's score with only these heads.

    The paper's rule is ``layers="last"``, ``search="single"`` and accuracy on labelled out-of-distribution
    validation data. The model is evaluated in eval mode and then set back to its mode; its parameters do
    not change. Each batch goes through the whole model once for each chosen layer (once in total with
    ``"exhaustive"``). Every further candidate only computes what follows the first attention it changes
    (see ``PrefixCache`` for what cannot be cached).

    Args:
        model: a classifier, images -> logits ``[B, classes]`` or an object with ``.logits``, whose chosen
            layers' heads can be masked (``dvf.supported``).
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
            that follow a spurious feature may well have: that they find the robust heads has
            not been measured. Prefer labels, however few.
        search: ``"single"``: each head of each layer alone, other layers whole. ``"greedy"``: start from
            all heads, drop the head whose loss hurts least, until one is left in each layer; every
            step is a candidate and runs through the loader once. ``"exhaustive"``: every
            combination, at most 4096.
        reference_loader: for ``"atc"``: labelled batches, as ``loader``'s, of data like the training data
            but held out.

    Returns:
        The candidates, best first; ties keep more heads, then lower indices.

    Raises:
        UsageError: wrong arguments, an empty loader, batches of another kind, an iterator where several runs
            are needed, labels missing, out of range or no numbers, missing groups, logits that are
            not finite, a reference loader with a score that has no use for it, or too many
            combinations.
        UnsupportedError: heads that cannot be seen, or a model that calls its modules in another order
            when run again.
    """
    check_choice("search", search, ("single", "greedy", "exhaustive"))
    if not callable(score):
        check_choice("score", score, tuple(SCORES))
    model = unwrap(model)
    chosen = choose_layers(model, layers)
    evaluate = _Evaluation(model, chosen, loader, reference_loader, score, search == "greedy")
    if search == "greedy":
        choices = _greedy(chosen, evaluate)
    else:
        choices = evaluate(_single(chosen) if search == "single" else [_exhaustive(chosen)])
    size = {id(c): sum(map(len, c.kept.values())) for c in choices}
    return sorted(choices, key=lambda c: (-c.score, -size[id(c)]))


def _single(layers: Sequence[AttentionLayer]) -> list[list[Kept]]:
    """The candidates of each layer: one of its heads alone."""
    return [[{layer.index: [head]} for head in range(layer.num_heads)] for layer in layers]


def _exhaustive(layers: Sequence[AttentionLayer]) -> list[Kept]:
    count = 1
    for layer in layers:
        count *= 2**layer.num_heads - 1
    if count > MAX_CANDIDATES:
        wanted = f"at most {MAX_CANDIDATES} combinations for 'exhaustive'"
        raise usage_error("search", wanted, count, "use 'greedy', or choose fewer layers")
    subsets = [
        list(chain(*(combinations(range(layer.num_heads), n + 1) for n in range(layer.num_heads))))
        for layer in layers
    ]
    return [
        {layer.index: list(h) for layer, h in zip(layers, heads, strict=True)}
        for heads in product(*subsets)
    ]


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
    """Scores candidates, all of them in one run of the loader.

    Candidates come in groups. Within a group, what precedes the first layer in which they differ is
    computed once per batch. Between batches only tallies are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[AttentionLayer],
        loader: Iterable[Any],
        reference: Iterable[Any] | None,
        score: Score,
        several: bool,
    ):
        self._model, self._loader, self._reference = model, loader, reference
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
        self._cache = PrefixCache(model, layers)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def __call__(self, groups: Sequence[Sequence[Kept]]) -> list[HeadChoice]:
        """Score the candidates of every group; returns them in order."""
        tallies = [[self._tally() for _ in group] for group in groups]
        training = [m for m in self._model.modules() if m.training]
        self._model.eval()
        try:
            with self._cache:
                self._run("loader", self._loader, groups, tallies)
                if self._reference is not None:
                    self._run("reference_loader", self._reference, groups, tallies)
        finally:
            for module in training:
                module.training = True
        return [
            HeadChoice(kept, tally.value())
            for group, scored in zip(groups, tallies, strict=True)
            for kept, tally in zip(group, scored, strict=True)
        ]

    def _run(
        self,
        name: str,
        loader: Iterable[Any],
        groups: Sequence[Sequence[Kept]],
        tallies: Sequence[Sequence[Any]],
    ) -> None:
        reference, seen = name == "reference_loader", 0
        if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, str, Mapping)):
            got = type(loader).__name__
            raise usage_error(name, "an iterable of batches", got, "pass a list or a DataLoader")
        for item in loader:
            batch = split_batch(name, item, self._model, self._device)
            labels, members = self._answers(name, batch)
            seen += batch.size
            for group, scored in zip(groups, tallies, strict=True):
                outputs = self._cache.outputs(group, *batch.args, **batch.kwargs)
                for output, tally in zip(outputs, scored, strict=True):
                    predictions = Predictions(_logits(output), labels, members)
                    _check(predictions)
                    (tally.refer if reference else tally.add)(predictions)
        if not seen:
            raise usage_error(name, "at least one batch", "none", "pass a list or a DataLoader")

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


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise usage_error(
            "model", "logits [B, classes]", got, "wrap the model in one that returns them"
        )
    return logits.float().cpu()


def _check(batch: Predictions) -> None:
    (count, classes), labels = batch.logits.shape, batch.labels
    if not torch.isfinite(batch.logits).all():
        raise usage_error("model", "finite logits", "NaN or infinity", "check the weights")
    if labels is not None and len(labels) != count:
        raise usage_error(
            "model", f"logits of {len(labels)} images", count, "give one row an image"
        )
    if labels is not None and count and not 0 <= labels.min() <= labels.max() < classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise usage_error("labels", f"class indices from 0 to {classes - 1}", got, "check the data")
