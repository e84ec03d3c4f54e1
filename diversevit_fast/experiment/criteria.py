"""Choose heads by a criterion of a head table: what ``select-heads --criterion`` does."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..data import batches
from ..errors import require, usage_error
from ..heads.criteria import head_criteria
from ..heads.few_labels import suggest_labels
from ..heads.head_table import HeadTable, head_table
from ..heads.selection import HeadChoice, select_heads

LABELS = 32  # that few_labels sees unless told otherwise
_BATCH = 256


def table_of(model: nn.Module, splits: Mapping[str, Any]) -> HeadTable:
    """Compute the table of all combinations of the last layer's heads on data sets by name."""
    loaders = {name: batches(dataset, _BATCH) for name, dataset in splits.items()}
    return head_table(model, loaders, layers="last", search="exhaustive")


def check_criterion(criterion: str, search: str, labels: int | None) -> None:
    """Check the options of ``select-heads`` that go together.

    Raises:
        UsageError: no such criterion, one with a search that needs a loader, or labels without use.
    """
    if criterion not in head_criteria():
        names = ", ".join(head_criteria())
        raise usage_error(
            "criterion", f"one of {names}", repr(criterion)[:60], "see --list-criteria"
        )
    if search == "greedy":
        hint = "use --search single or exhaustive"
        raise usage_error("search", "a search that a table holds", "greedy", hint)
    if labels is not None and criterion != "few_labels":
        raise usage_error("labels", "--criterion few_labels", criterion, "leave --labels out")


def rank(
    table: HeadTable, criterion: str, search: str, labels: int | None = None, seed: int = 0
) -> tuple[list[HeadChoice], list[str]]:
    """Rank the table's choices; returns them with the lines of warnings.

    Args:
        table: with splits ``id`` and ``ood``.
        criterion: a name of ``head_criteria``.
        search: ``single`` or ``exhaustive``.
        labels: for ``few_labels``, how many labels of ``ood`` it sees.
        seed: for ``few_labels``, of the draw.
    """
    if search == "single":
        table = table.single_heads()
    options: dict[str, Any] = {}
    if criterion == "few_labels":
        answers = table.split("ood").labels
        assert answers is not None
        request = suggest_labels(table, LABELS if labels is None else labels, seed=seed)
        options = {"request": request, "labels": answers[request.indices]}
    name: Any = criterion
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        choices = select_heads(table, criterion=name, **options)
    return choices, [str(warning.message) for warning in said]


def show_criteria() -> None:
    """Print the criteria with what they need, compute and fail with."""
    console = require("rich.console", extra="train").Console()
    for criterion in head_criteria().values():
        console.print(criterion.name, style="bold", highlight=False)
        for what, text in (
            ("needs", criterion.needs),
            ("score", criterion.formula),
            ("fails", criterion.failure),
            ("source", criterion.source),
        ):
            console.print(f"  {what:7}{text}", highlight=False, markup=False, soft_wrap=True)


def choose(
    model: nn.Module, splits: Mapping[str, Any], criterion: str, search: str, labels: int | None
) -> tuple[list[HeadChoice], list[str]]:
    """Rank choices of heads of ``model`` on its validation splits; returns as ``rank``."""
    table = table_of(model, {"id": splits["val_id"], "ood": splits["val_ood"]})
    return rank(table, criterion, search, labels)
