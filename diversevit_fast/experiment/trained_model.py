"""Load the data of a trained model for ``evaluate`` and ``select-heads``, and print their tables."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..data import batches, load_splits
from ..errors import usage_error
from ..heads.criteria import head_criteria
from ..heads.pruning import keep_heads, prune_heads
from ..heads.selection import HeadChoice, select_heads
from .config import read_config, resolve
from .criteria import choose
from .evaluate import evaluate, evaluate_splits
from .metrics import EVALUATED, Row
from .model_files import config_beside
from .models import AnyModel
from .tables import new_table, print_json, print_table

SEARCHES = ("single", "greedy", "exhaustive")
SCORES = ("accuracy", "worst_group", "confidence")
_SHOWN = 10  # choices of heads listed by ``select-heads``
_TESTS = EVALUATED[2:]
_LEGEND = "accuracy (accuracy of the worst group)"
_DATA_KEYS = (
    *("data", "source", "metadata", "img_size"),
    *("correlation", "samples", "data_seed", "download", "label_noise"),
)


@dataclass(frozen=True)
class Rule:
    """How ``select-heads`` chooses: by ``score``, unless there is a ``criterion`` of a head table."""

    search: str
    score: str = "accuracy"
    criterion: str | None = None
    labels: int | None = None  # that few_labels sees

    @property
    def data(self) -> str:
        """The data that are looked at, in words."""
        if self.criterion is None:
            return "OOD validation"
        return f"validation: {head_criteria()[self.criterion].needs}"


def splits_for(
    weights: str, options: Mapping[str, Any], config: str | None, model: AnyModel
) -> tuple[Mapping[str, Any], str]:
    """Return the data to evaluate ``weights`` on, and their name.

    Options beat ``config``, which is the ``config.json`` beside the weights if there is one and
    ``--data`` does not ask for other data.

    Raises:
        UsageError: the data are missing or do not fit the model.
    """
    if config is not None or "data" not in options:
        config = config_beside(weights, config)
    filed = {} if config is None else read_config(config)
    settings = resolve({**{k: filed[k] for k in _DATA_KEYS if k in filed}, **options})
    splits = load_splits(settings.data, **settings.data_arguments())
    data, hint = splits["test_id"], "give the weights' own data"
    images = (data.images.shape[1], *data.image_size)
    wished = (model.config["channels"], *model.config["image_size"])
    if images != wished:
        raise usage_error("data", f"images {list(wished)}, as the model's", list(images), hint)
    if (classes := model.config["num_classes"]) != data.num_classes:
        raise usage_error("data", f"{classes} classes, as the model's", data.num_classes, hint)
    return splits, settings.data + (f" (as in {config})" if config else "")


def show_evaluation(
    model: AnyModel, splits: Mapping[str, Any], title: str, *, as_json: bool = False
) -> None:
    """Print accuracy and worst-group accuracy of every choice of heads on every split."""
    rows = [row for rows in evaluate_splits(model, splits).values() for row in rows]
    if as_json:
        return print_json({"of": title, "rows": rows})
    table = new_table("heads", *EVALUATED)
    for heads in dict.fromkeys(row["heads"] for row in rows):
        at = {row["split"]: row for row in rows if row["heads"] == heads}
        table.add_row(heads, *(_cell(at[split]) for split in EVALUATED))
    print_table(title, table, f"{_LEGEND}; a number: that head alone")


@dataclass(frozen=True)
class Selection:
    """What ``select-heads`` found: the choices, the best first, and what it and all heads reach on the tests."""

    rule: Rule
    choices: list[HeadChoice]
    notes: list[str]  # warnings of the criterion
    selected: list[Row]
    whole: list[Row]


def select(model: AnyModel, splits: Mapping[str, Any], rule: Rule) -> Selection:
    """Rank choices of heads on validation data; evaluate the best, and all heads, on the test sets."""
    if rule.criterion is None:
        loader = list(batches(splits["val_ood"], 256))
        wanted: Any = rule.score  # select_heads checks the word
        choices = select_heads(model, loader, layers="last", search=rule.search, score=wanted)
        notes: list[str] = []
    else:
        choices, notes = choose(model, splits, rule.criterion, rule.search, rule.labels)
    with keep_heads(model, choices[0].kept):
        selected = [_with_all_heads(model, splits[split], split) for split in _TESTS]
    whole = [_with_all_heads(model, splits[split], split) for split in _TESTS]
    return Selection(rule, choices, notes, selected, whole)


def show_selection(found: Selection, title: str) -> None:
    """Print the best choices of heads, and what the very best does on the tests."""
    rule, choices = found.rule, found.choices
    errors = choices[0].error is not None
    table = new_table("heads", rule.criterion or rule.score, *["± error"] * errors)
    for choice in choices[:_SHOWN]:
        error = [] if choice.error is None else [f"{choice.error:.3f}"]
        table.add_row(_heads(choice), f"{choice.score:.3f}", *error)
    shown = f"the best {_SHOWN} of {len(choices)}" if len(choices) > _SHOWN else ""
    print_table(f"{title}, {rule.data}", table, "\n".join([*found.notes, shown]))
    table = new_table("heads", *_TESTS)
    table.add_row(f"selected: {_heads(choices[0])}", *map(_cell, found.selected))
    table.add_row("all", *map(_cell, found.whole))
    print_table("Test sets", table, _LEGEND)


def print_selection(found: Selection, title: str, saved: str | None) -> None:
    """Print every choice of heads, and what the best and all heads do on the tests, as JSON.

    Args:
        saved: the file of the pruned model, if one was written.
    """
    chosen = [
        {"heads": choice.kept, "score": choice.score, "error": choice.error}
        for choice in found.choices
    ]
    print_json(
        {
            **{"of": title, "rule": asdict(found.rule), "notes": found.notes},
            **{"choices": chosen, "selected": found.selected, "all": found.whole, "saved": saved},
        }
    )


def save_pruned(model: AnyModel, choice: HeadChoice, path: str) -> None:
    """Write the model without the heads that were not chosen."""
    prune_heads(model, choice.kept)
    model.save(path)


def _with_all_heads(model: AnyModel, dataset: Any, split: str) -> Row:
    return evaluate(model, dataset, split, each_head=False)[0]


def _cell(row: Row) -> str:
    return f"{row['accuracy']:.3f} ({row['worst_group']:.3f})"


def _heads(choice: HeadChoice) -> str:
    return ", ".join(str(head) for heads in choice.kept.values() for head in heads)
