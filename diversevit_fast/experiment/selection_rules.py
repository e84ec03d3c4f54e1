"""The rules that ``selection-study`` compares; a new one is a row of ``_RULES``.

A rule takes the table of a model and a seed, and returns the row of the table that it chooses. The table has
the splits ``id`` and ``ood``, both with labels and groups; a rule looks at what its ``needs`` say.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..heads.few_labels import suggest_labels
from ..heads.head_table import HeadTable
from ..heads.selection import select_heads

DRAWS = 20  # of the rules that look at a random few labels
FEW = (16, 32, 64)
BASELINE = "accuracy, OOD validation"


@dataclass(frozen=True)
class Rule:
    """One row of the study.

    Attributes:
        name: what tables call it.
        needs: the labels it looks at, in words.
        choose: ``(table, seed) -> row``.
        draws: how often it is repeated, with seeds from 0, where it draws at random.
    """

    name: str
    needs: str
    choose: Callable[[HeadTable, int], int]
    draws: int = 1


def rules() -> list[Rule]:
    """All rules, in the order of the tables."""
    return list(_RULES)


def row_of(table: HeadTable, criterion: Any, **options: Any) -> int:
    """The row of the table that ``select_heads`` ranks first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few mistakes; the study counts refusals
        best = select_heads(table, criterion=criterion, **options)[0].kept
    return next(row for row in table.choices if table.kept[row] == best)


def _criterion(name: str, needs: str, criterion: str, **options: Any) -> Rule:
    return Rule(name, needs, lambda table, _: row_of(table, criterion, **options))


def _few_labels(table: HeadTable, k: int, seed: int) -> int:
    request = suggest_labels(table, k, seed=seed)
    labels: Any = table.split("ood").labels
    return row_of(table, "few_labels", request=request, labels=labels[request.indices])


def _random_labels(table: HeadTable, k: int, seed: int) -> int:
    split = table.split("ood")
    drawn = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:k]
    return row_of(table, lambda t: t.split("ood").images(drawn).hits.double().mean(1))


def _few(k: int) -> list[Rule]:
    return [
        Rule(
            f"{k} labels at random", f"{k} OOD labels", lambda t, s: _random_labels(t, k, s), DRAWS
        ),
        Rule(f"few_labels, {k}", f"{k} OOD labels", lambda t, s: _few_labels(t, k, s), DRAWS),
    ]


_RULES = (
    _criterion(BASELINE, "OOD labels", "accuracy"),
    _criterion("worst_group, OOD validation", "OOD labels, groups", "worst_group"),
    *(rule for k in reversed(FEW) for rule in _few(k)),
    _criterion("group_mean, ID", "ID labels, groups", "group_mean", split="id"),
    _criterion("worst_group, ID", "ID labels, groups", "worst_group", split="id"),
    _criterion("mistakes of the best head", "ID labels", "mistakes"),
    _criterion("mistakes of the whole model", "ID labels", "mistakes", reference="all"),
    _criterion("agreement_drop", "no label", "agreement_drop"),
    _criterion("mano", "no label", "mano"),
    _criterion("confidence", "no label", "confidence"),
    _criterion("atc", "ID labels", "atc"),
    _criterion("accuracy, ID", "ID labels", "accuracy", split="id"),
)
