"""HeadTable: what every choice of heads predicts on several splits, computed once for all criteria."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attachment.attention_modules import AttentionLayer, choose_layers
from ..attachment.indices import Integers
from ..attachment.parallel import unwrap
from ..errors import UsageError, usage_error
from ..files import StrPath
from ..ops.checks import check_choice
from .candidates import Kept, all_combinations, single_heads
from .evaluation import Runner
from .loader_batches import Batch, class_indices, group_names
from .scores import Predictions

DTYPES = {
    "confidence": torch.float64,
    "entropy": torch.float32,
    "logsumexp": torch.float32,
    "fourth_powers": torch.float32,
}
MEASURES = tuple(DTYPES)


@dataclass(frozen=True)
class SplitPredictions:
    """The predictions of R choices of heads for the n images of a split, on the CPU.

    With p the softmax of the logits z:

    Attributes:
        predicted: int64 ``[R, n]``, the class of the largest logit.
        confidence: float64 ``[R, n]``, the largest p; in float32 those near 1 would all be 1.
        entropy: float32 ``[R, n]``, minus the sum of p log p, in nats.
        logsumexp: float32 ``[R, n]``, the logarithm of the sum of exp z.
        fourth_powers: float32 ``[R, n]``, the sum of p to the fourth.
        labels: int64 ``[n]``, or None if the loader gave none.
        groups: int64 ``[n]``, places in the table's ``group_names``; or None.
    """

    predicted: Tensor
    confidence: Tensor
    entropy: Tensor
    logsumexp: Tensor
    fourth_powers: Tensor
    labels: Tensor | None = None
    groups: Tensor | None = None

    def __len__(self) -> int:
        return self.predicted.shape[1]

    @property
    def hits(self) -> Tensor:
        """Whether the predicted class is the label, bool ``[R, n]``.

        Raises:
            UsageError: there are no labels.
        """
        if self.labels is None:
            hint = "let the loader yield (images, labels)"
            raise usage_error("table", "a split with labels", "images alone", hint)
        return self.predicted == self.labels

    def rows(self, rows: Tensor) -> "SplitPredictions":
        """The same of some choices of heads, in the order of ``rows``."""
        chosen = {name: getattr(self, name)[rows] for name in ("predicted", *MEASURES)}
        return replace(self, **chosen)

    def images(self, indices: Tensor) -> "SplitPredictions":
        """The same of some images, in the order of ``indices``."""
        chosen = {name: getattr(self, name)[:, indices] for name in ("predicted", *MEASURES)}
        answers = {
            name: None if (x := getattr(self, name)) is None else x[indices]
            for name in ("labels", "groups")
        }
        return replace(self, **chosen, **answers)


@dataclass(frozen=True)
class HeadTable:
    """What every choice of heads predicts on every split. Made by ``dvf.head_table`` or ``load``.

    ``dvf.select_heads(table, criterion=...)`` ranks its choices.

    Attributes:
        kept: the heads that stay, by layer, of every row; the first row is the whole model.
        heads: how many heads each chosen layer has.
        classes: the number of logits.
        search: ``"single"`` (the whole model is then no choice but a reference) or ``"exhaustive"``.
        splits: by name.
        group_names: what ``groups`` of the splits point at; numbers as text.
    """

    kept: tuple[Kept, ...]
    heads: dict[int, int]
    classes: int
    search: str
    splits: dict[str, SplitPredictions]
    group_names: tuple[str, ...] = field(default=())

    @property
    def choices(self) -> list[int]:
        """The rows that are ranked."""
        return self.singles if self.search == "single" else list(range(len(self.kept)))

    @property
    def singles(self) -> list[int]:
        """The rows that keep one head in one layer, and the other layers whole."""
        return [row for row, kept in enumerate(self.kept) if self._is_single(kept, row == 0)]

    def _is_single(self, kept: Kept, first: bool) -> bool:
        if self.search == "single":
            return not first
        sizes = {layer: len(kept.get(layer, range(n))) for layer, n in self.heads.items()}
        return any(
            sizes[layer] == 1 and all(sizes[m] == n for m, n in self.heads.items() if m != layer)
            for layer in self.heads
        )

    def split(self, name: str) -> SplitPredictions:
        """The split of that name.

        Raises:
            UsageError: there is none.
        """
        if name not in self.splits:
            listed = ", ".join(self.splits)
            hint = "make the table with that loader, or name another split"
            raise usage_error("table", f"a split {name!r}", listed, hint)
        return self.splits[name]

    def single_heads(self) -> "HeadTable":
        """The table of the single heads alone, as ``search="single"`` would have made it."""
        order = torch.tensor([0, *self.singles])
        return replace(
            self,
            kept=tuple(self.kept[row] for row in order.tolist()),
            search="single",
            splits={name: split.rows(order) for name, split in self.splits.items()},
        )

    def save(self, path: StrPath) -> None:
        """Write the table to ``path``, a NumPy ``.npz`` archive, whole or not at all.

        Raises:
            UsageError: the system refuses.
        """
        from .table_files import write_table

        write_table(self, path)

    @classmethod
    def load(cls, path: StrPath) -> "HeadTable":
        """Read what ``save`` wrote. Nothing in the file is run, and no pickle is read.

        Raises:
            UsageError: no such file, or one that is damaged or no table.
        """
        from .table_files import read_table

        return read_table(path)


def head_table(
    model: nn.Module,
    loaders: Mapping[str, Iterable[Any]],
    *,
    layers: str | Integers = "last",
    search: Literal["single", "exhaustive"] = "exhaustive",
) -> HeadTable:
    """Compute what every choice of heads predicts on every split, for ``dvf.select_heads``.

    Each loader is run through once, in eval mode; what precedes the heads is computed once per batch
    (``PrefixCache``). The table takes 28 bytes per choice and image.

    Args:
        model: as for ``dvf.select_heads``.
        loaders: by the name of the split, batches as for ``dvf.select_heads``; labels and groups may
            be missing. The criteria look for ``"id"``, held-out data like the training data, and
            ``"ood"``, data of the kind that the model is to be used on.
        layers: as for ``dvf.select_heads``.
        search: ``"exhaustive"``: every combination, at most 4096; ``"single"``: each head of each
            layer alone.

    Raises:
        UsageError: as ``dvf.select_heads``; no loader; labels or groups in some batches only.
        UnsupportedError: as ``dvf.select_heads``.
    """
    check_choice("search", search, ("single", "exhaustive"))
    if not isinstance(loaders, Mapping) or not loaders:
        got = "none" if isinstance(loaders, Mapping) else type(loaders).__name__
        hint = 'pass {"id": loader, "ood": loader}'
        raise usage_error("loaders", "loaders by the name of the split", got, hint)
    model = unwrap(model)
    chosen = choose_layers(model, layers)
    heads = {layer.index: layer.num_heads for layer in chosen}
    groups = _groups(chosen, search)
    runner, names = Runner(model, chosen), dict[str, int]()
    with runner.evaluating():
        collected = {
            str(name): _Split(str(name), groups).run(runner, loader, names)
            for name, loader in loaders.items()
        }
    classes = {classes for _, classes in collected.values()}
    if len(classes) > 1:
        hint = "give all splits the same classes"
        raise usage_error("model", "the same number of logits", sorted(classes), hint)
    return HeadTable(
        kept=tuple(kept for group in groups for kept in group),
        heads=heads,
        classes=classes.pop(),
        search=search,
        splits={name: split for name, (split, _) in collected.items()},
        group_names=tuple(names),
    )


def _groups(layers: list[AttentionLayer], search: str) -> list[list[Kept]]:
    """Candidates in groups that share a prefix; the first of all is the whole model."""
    whole = {layer.index: list(range(layer.num_heads)) for layer in layers}
    if search == "exhaustive":
        return [[whole, *(kept for kept in all_combinations(layers) if kept != whole)]]
    first, *others = single_heads(layers)
    return [[whole, *first], *others]


class _Split:
    """Gathers the predictions of all candidates on one split."""

    def __init__(self, name: str, groups: list[list[Kept]]):
        self._name, self._groups = name, groups
        self._rows: list[list[list[dict[str, Tensor]]]] = [[[] for _ in group] for group in groups]
        self._labels: list[Tensor | None] = []
        self._members: list[Tensor | list[str] | None] = []
        self._classes = set[int]()

    def run(
        self, runner: Runner, loader: Iterable[Any], names: dict[str, int]
    ) -> tuple[SplitPredictions, int]:
        """Return the split's predictions and the number of classes; adds to the groups' names."""
        for i, j, predictions in runner.predictions(
            self._name, loader, self._groups, self._answers
        ):
            self._rows[i][j].append(_measure(predictions))
            self._classes.add(predictions.logits.shape[1])
        if len(self._classes) > 1:
            got = sorted(self._classes)
            raise usage_error("model", "the same number of logits", got, "return all classes")
        columns = {
            key: torch.stack([_joined(row, key) for group in self._rows for row in group])
            for key in ("predicted", *MEASURES)
        }
        labels = self._all_or_none("labels", self._labels)
        members = self._all_or_none("groups", self._members)
        split = SplitPredictions(
            **columns,
            labels=None if labels is None else torch.cat(labels).long(),
            groups=None if members is None else _places(members, names),
        )
        return split, self._classes.pop()

    def _answers(self, name: str, batch: Batch) -> tuple[Tensor | None, Tensor | list[str] | None]:
        labels = None if batch.labels is None else class_indices(batch.labels, batch.size)
        groups = None if batch.groups is None else group_names(batch.groups, batch.size, named=True)
        self._labels.append(labels)
        self._members.append(groups)
        return labels, groups

    def _all_or_none(self, what: str, found: list[Any]) -> list[Any] | None:
        missing = sum(x is None for x in found)
        if missing == len(found):
            return None
        if missing:
            raise self._mixed(what, missing, len(found))
        return found

    def _mixed(self, what: str, missing: int, count: int) -> UsageError:
        got = f"none in {missing} of {count}"
        return usage_error(self._name, f"{what} in every batch", got, "give all, or leave all out")


def _measure(predictions: Predictions) -> dict[str, Tensor]:
    logits = predictions.logits.double()
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    measured = {
        "confidence": p.amax(-1),
        "entropy": -(p * log_p).sum(-1),
        "logsumexp": logits.logsumexp(-1),
        "fourth_powers": p.pow(4).sum(-1),
    }
    return {
        "predicted": predictions.logits.argmax(-1),
        **{key: value.to(DTYPES[key]) for key, value in measured.items()},
    }


def _joined(row: list[dict[str, Tensor]], key: str) -> Tensor:
    return torch.cat([batch[key] for batch in row])


def _places(members: list[Tensor | list[str]], names: dict[str, int]) -> Tensor:
    """Convert groups to places in ``names``, which grows by the new ones."""
    listed = [
        str(name)
        for batch in members
        for name in (batch if isinstance(batch, list) else batch.tolist())
    ]
    return torch.tensor([names.setdefault(name, len(names)) for name in listed])
