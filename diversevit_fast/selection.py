"""Choosing heads on validation data: which heads of a trained model follow the robust feature."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention_modules import AttentionLayer, choose_layers
from .errors import expected
from .ops.checks import check_choice
from .pruning import keep_heads

Score = Literal["accuracy", "worst_group"] | Callable[[Tensor, Tensor, Tensor | None], float]
MAX_CANDIDATES = 4096


@dataclass(frozen=True)
class HeadChoice:
    """One candidate: the heads that stay in each layer, and its score on the validation data."""

    kept: dict[int, list[int]]
    score: float


def select_heads(
    model: nn.Module,
    loader: Iterable[Sequence[Any]],
    *,
    layers: str | Sequence[int] = "last",
    score: Score = "accuracy",
    search: str = "single",
) -> list[HeadChoice]:
    """Rank choices of heads by how well the model does with only these on labelled data.

    The paper's rule is ``layers="last"``, ``search="single"`` on out-of-distribution validation data.
    The model is evaluated in eval mode, as it is found afterwards; its parameters stay.

    Args:
        model: a classifier with timm ``Attention`` or ``dvf.nn.MultiHeadAttention`` layers.
        loader: batches ``(images, labels)`` or ``(images, labels, groups)``; iterated several times.
        layers: the layers to choose in: ``"last"``, ``"all"`` or indices.
        score: ``"accuracy"``; ``"worst_group"`` (accuracy of the worst group; needs groups); or a
            callable ``(logits [n, classes], labels [n], groups [n] or None) -> float``, larger is better.
        search: ``"single"``: each head of each layer alone, other layers whole. ``"greedy"``: start from
            all heads, drop the head whose loss hurts least, until one is left in each layer; every
            step is a candidate. ``"exhaustive"``: every combination, at most 4096.

    Returns:
        The candidates, best first; ties keep more heads, then lower indices.

    Raises:
        UsageError: wrong arguments, an empty loader, labels out of range, missing groups, logits that
            are not finite, or too many combinations.
    """
    check_choice("search", search, ("single", "greedy", "exhaustive"))
    if not callable(score):
        check_choice("score", score, ("accuracy", "worst_group"))
    chosen = choose_layers(model, layers)
    evaluate = _Evaluation(model, loader, score)
    if search == "greedy":
        choices = _greedy(chosen, evaluate)
    else:
        candidates = _single(chosen) if search == "single" else _exhaustive(chosen)
        choices = [HeadChoice(kept, evaluate(kept)) for kept in candidates]
    size = {id(c): sum(map(len, c.kept.values())) for c in choices}
    return sorted(choices, key=lambda c: (-c.score, -size[id(c)]))


def _single(layers: Sequence[AttentionLayer]) -> list[dict[int, list[int]]]:
    return [{layer.index: [head]} for layer in layers for head in range(layer.num_heads)]


def _exhaustive(layers: Sequence[AttentionLayer]) -> Iterator[dict[int, list[int]]]:
    count = 1
    for layer in layers:
        count *= 2**layer.num_heads - 1
    if count > MAX_CANDIDATES:
        wanted = f"at most {MAX_CANDIDATES} combinations for 'exhaustive'"
        raise expected("search", wanted, count, "use 'greedy', or choose fewer layers")
    subsets = [
        list(chain(*(combinations(range(layer.num_heads), n + 1) for n in range(layer.num_heads))))
        for layer in layers
    ]
    for heads in product(*subsets):
        yield {layer.index: list(h) for layer, h in zip(layers, heads, strict=True)}


def _greedy(
    layers: Sequence[AttentionLayer], evaluate: Callable[[dict[int, list[int]]], float]
) -> list[HeadChoice]:
    kept = {layer.index: list(range(layer.num_heads)) for layer in layers}
    path = [HeadChoice(kept, evaluate(kept))]
    while any(len(heads) > 1 for heads in kept.values()):
        steps = [
            {**kept, index: [h for h in heads if h != dropped]}
            for index, heads in kept.items()
            if len(heads) > 1
            for dropped in heads
        ]
        path.append(max((HeadChoice(s, evaluate(s)) for s in steps), key=lambda c: c.score))
        kept = path[-1].kept
    return path


class _Evaluation:
    """The score of one choice of heads over the whole loader."""

    def __init__(self, model: nn.Module, loader: Iterable[Sequence[Any]], score: Score):
        self._model, self._loader = model, loader
        self._score: Score = score
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def __call__(self, kept: dict[int, list[int]]) -> float:
        logits, labels, groups = [], [], []
        training = [m for m in self._model.modules() if m.training]
        self._model.eval()
        try:
            with torch.inference_mode(), keep_heads(self._model, kept):
                for images, label, *group in self._loader:
                    logits.append(self._model(images.to(self._device)).float().cpu())
                    labels.append(torch.as_tensor(label).cpu())
                    groups += [torch.as_tensor(group[0]).cpu()] if group else []
        finally:
            for module in training:
                module.training = True
        if not logits or not sum(map(len, labels)):
            raise expected("loader", "at least one batch", "none", "pass a list or a DataLoader")
        joined = torch.cat(groups) if groups else None
        return score_predictions(torch.cat(logits), torch.cat(labels), joined, self._score)


def score_predictions(
    logits: Tensor, labels: Tensor, groups: Tensor | None, score: Score = "accuracy"
) -> float:
    """The score of logits ``[n, classes]`` for labels ``[n]`` (and groups ``[n]``), as ``select_heads``.

    Raises:
        UsageError: labels out of range, logits not finite, ``"worst_group"`` without groups.
    """
    classes = logits.shape[-1]
    if not torch.isfinite(logits).all():
        raise expected("model", "finite logits", "NaN or infinity", "check the weights")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise expected("labels", f"class indices from 0 to {classes - 1}", got, "check the data")
    if callable(score):
        return float(score(logits, labels, groups))
    correct = (logits.argmax(-1) == labels).double()
    if score == "accuracy":
        return float(correct.mean())
    if groups is None:
        cure = "let the loader yield (images, labels, groups)"
        raise expected("loader", "groups for score='worst_group'", "none", cure)
    return float(min(correct[groups == g].mean() for g in groups.unique()))
