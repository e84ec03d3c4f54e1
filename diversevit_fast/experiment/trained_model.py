"""Load a trained model and its data for ``evaluate`` and ``select-heads``, and print their tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import batches, load_splits
from ..errors import require, usage_error
from ..heads.pruning import keep_heads, prune_heads
from ..heads.selection import HeadChoice, select_heads
from ..models import DiverseViT
from .config import is_path, read_config, resolve
from .evaluate import evaluate, evaluate_splits
from .metrics import EVALUATED, Row

SEARCHES = ("single", "greedy", "exhaustive")
SCORES = ("accuracy", "worst_group", "confidence")
_SHOWN = 10  # choices of heads listed by ``select-heads``
_LEGEND = "accuracy (accuracy of the worst group)"
_DATA_KEYS = ("data", "source", "correlation", "samples", "data_seed", "download")


def load_model(path: str) -> DiverseViT:
    """Load the model in a ``.safetensors`` file, in evaluation mode.

    Raises:
        UsageError: another file, or weights that are not float32 or not finite.
    """
    model = DiverseViT.load(path).eval()
    for name, tensor in model.state_dict().items():
        if tensor.dtype != torch.float32:
            hint = "save them in that dtype"
            raise usage_error("weights", "tensors of dtype torch.float32", f"{tensor.dtype}", hint)
        if not tensor.isfinite().all():
            hint = "take those of another training"
            raise usage_error("weights", "finite numbers", f"NaN or infinity in {name}", hint)
    return model


def splits_for(
    weights: Path, options: Mapping[str, Any], config: str | None, model: DiverseViT
) -> tuple[Mapping[str, Any], str]:
    """Return the data to evaluate ``weights`` on, and their name.

    Options beat ``config``, which is the ``config.json`` beside the weights if there is one and
    ``--data`` does not ask for other data.

    Raises:
        UsageError: the data are missing or do not fit the model.
    """
    if config is not None and not is_path(config):
        raise usage_error("config", "a JSON file", repr(config), "name one, or leave it out")
    beside = weights.parent / "config.json"
    if config is None and "data" not in options and beside.exists():
        config = str(beside)
    filed = {} if config is None else read_config(config)
    settings = resolve({**{k: filed[k] for k in _DATA_KEYS if k in filed}, **options})
    splits = load_splits(
        settings.data,
        source=settings.source,
        seed=settings.data_seed,
        correlation=settings.correlation,
        samples=settings.samples,
        download=settings.download,
    )
    data, hint = splits["test_id"], "give the weights' own data"
    images = (data.images.shape[1], *data.image_size)
    wished = (model.config["channels"], *model.config["image_size"])
    if images != wished:
        raise usage_error("data", f"images {list(wished)}, as the model's", list(images), hint)
    if (classes := model.config["num_classes"]) != data.num_classes:
        raise usage_error("data", f"{classes} classes, as the model's", data.num_classes, hint)
    return splits, settings.data + (f" (as in {config})" if config else "")


def show_evaluation(model: DiverseViT, splits: Mapping[str, Any], title: str) -> None:
    """Print accuracy and worst-group accuracy of every choice of heads on every split."""
    rows = [row for rows in evaluate_splits(model, splits).values() for row in rows]
    table = _table("heads", *EVALUATED)
    for heads in dict.fromkeys(row["heads"] for row in rows):
        at = {row["split"]: row for row in rows if row["heads"] == heads}
        table.add_row(heads, *(_cell(at[split]) for split in EVALUATED))
    _print(title, table, f"{_LEGEND}; a number: that head alone")


def show_selection(
    model: DiverseViT, splits: Mapping[str, Any], title: str, search: str, score: str
) -> HeadChoice:
    """Rank choices of heads on OOD validation; print them and what the best does on the tests."""
    loader = list(batches(splits["val_ood"], 256))
    wanted: Any = score  # select_heads checks the word
    choices = select_heads(model, loader, layers="last", search=search, score=wanted)
    table = _table("heads", score)
    for choice in choices[:_SHOWN]:
        table.add_row(_heads(choice), f"{choice.score:.3f}")
    note = f"the best {_SHOWN} of {len(choices)}" if len(choices) > _SHOWN else ""
    _print(f"{title}, OOD validation", table, note)
    best = choices[0]
    tests = EVALUATED[2:]
    table = _table("heads", *tests)
    with keep_heads(model, best.kept):
        selected = [_with_all_heads(model, splits[split], split) for split in tests]
    whole = [_with_all_heads(model, splits[split], split) for split in tests]
    table.add_row(f"selected: {_heads(best)}", *map(_cell, selected))
    table.add_row("all", *map(_cell, whole))
    _print("Test sets", table, _LEGEND)
    return best


def save_pruned(model: DiverseViT, choice: HeadChoice, path: str) -> None:
    """Write the model without the heads that were not chosen."""
    prune_heads(model, choice.kept)
    model.save(path)


def _with_all_heads(model: DiverseViT, dataset: Any, split: str) -> Row:
    return evaluate(model, dataset, split)[0]


def _cell(row: Row) -> str:
    return f"{row['accuracy']:.3f} ({row['worst_group']:.3f})"


def _heads(choice: HeadChoice) -> str:
    return ", ".join(str(head) for heads in choice.kept.values() for head in heads)


def _table(*columns: str) -> Any:
    table = require("rich.table", extra="train").Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _print(title: str, table: Any, note: str) -> None:
    console = require("rich.console", extra="train").Console()
    console.print(title, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(table)
    console.print(note, highlight=False, soft_wrap=True)
