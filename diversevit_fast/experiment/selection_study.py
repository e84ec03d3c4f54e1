"""Compare rules that choose heads, over the models of several runs: ``diversevit selection-study``.

For each model the predictions of every choice of heads are computed once and kept in ``tables/``, so that a
study can be continued and repeated under other conditions.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import load_splits
from ..data.label_noise import noisy_labels
from ..errors import UsageError, usage_error
from ..files import make_folder, path_exists
from ..heads.head_table import HeadTable
from ..version import __version__
from .checkpoint import Task
from .config import Settings, is_path, read_json
from .criteria import table_of
from .model_files import load_model
from .run import fingerprint, tasks_of
from .run_files import digest_of, write_json, write_text
from .selection_report import markdown
from .selection_rules import BASELINE, rules

POOLS = {"single": "single heads", "subsets": "all subsets"}
MEASURES = ("test_ood", "worst_group", "test_id", "regret")
RESAMPLES = 2000
MARGIN = 0.02  # a rule is no worse than the baseline if its regret exceeds that one's by less
_CSV = ("run", "method", "seed", "pool", "rule", "heads", *MEASURES, "refused")


@dataclass(frozen=True)
class Conditions:
    """What the models and the data of a study are.

    Attributes:
        epoch: ``"best"``, the epoch of the head that was best on OOD validation, or ``"last"``.
        id_split: ``"val_id"`` or ``"train"``: where rules look at in-distribution data.
        label_noise: the fraction of their labels that are replaced by another class.
        shift: if False, the OOD data are in-distribution data too: a half of the ID test set to choose
            on, the other to test.
    """

    epoch: str = "best"
    id_split: str = "val_id"
    label_noise: float = 0.0
    shift: bool = True

    def __post_init__(self) -> None:
        for name, words in (("epoch", ("best", "last")), ("id_split", ("val_id", "train"))):
            if getattr(self, name) not in words:
                got = repr(getattr(self, name))[:60]
                raise usage_error(name, f"one of {', '.join(words)}", got, "check the spelling")
        if not 0 <= self.label_noise <= 1:
            got = self.label_noise
            raise usage_error("label_noise", "a fraction from 0 to 1", got, "try 0.1")


@dataclass(frozen=True)
class Trained:
    """A trained model of a finished run."""

    run: Path
    task: Task
    weights: Path


def study(
    runs: Sequence[str],
    out: str,
    conditions: Conditions,
    said: Callable[[str], object] = lambda line: None,
) -> Path:
    """Compare all rules on all models of ``runs``; write the results to the folder ``out``.

    Args:
        runs: folders of finished runs, or of trainings.
        out: made if it does not exist; tables of models that are there are not computed again.
        conditions: of the comparison.
        said: takes a line for each model.

    Returns:
        ``out``: ``selection.json``, ``selection.csv``, ``selection.md`` and ``tables/``.

    Raises:
        UsageError: a run is missing, unfinished or of other data than can be loaded, two runs are the
            same, or files cannot be read or written.
    """
    if not is_path(out):
        raise usage_error("out", "the name of a folder", repr(out)[:60], "name one")
    folder = Path(out)
    tables = folder / "tables"
    found = [model for run in runs for model in _models_of(run, conditions.epoch)]
    if len({model.weights.resolve() for model in found}) < len(found):
        raise usage_error("runs", "different folders", "one of them twice", "name it once")
    for missing in (folder, tables):
        make_folder(missing)
    rows = []
    for model, table in _tables(found, tables, conditions.id_split, said):
        rows += _compare(model, _conditioned(table, conditions))
    record = {
        "version": __version__,
        "conditions": asdict(conditions),
        "models": [f"{model.run.name}/{model.task}" for model in found],
        "settings": _settings(runs),
        "pools": {pool: _summarise([r for r in rows if r["pool"] == pool]) for pool in POOLS},
    }
    write_text(folder / "selection.csv", _as_csv(rows))
    write_text(folder / "selection.md", markdown(record))
    write_json(folder / "selection.json", record)
    return folder


def _settings(runs: Sequence[str]) -> list[dict[str, Any]]:
    """The different settings of the runs, without what differs in any case or says where files are."""
    found: list[dict[str, Any]] = []
    for run in runs:
        settings = _settings_of(run).to_json()
        for name in ("seeds", "methods", "source", "metadata", "workers", "threads"):
            settings.pop(name, None)
        if settings not in found:
            found.append(settings)
    return found


def _settings_of(run: str) -> Settings:
    return Settings.from_json(_record_of(run)["settings"])


def _record_of(run: str) -> dict[str, Any]:
    if not is_path(run) or not path_exists(run):
        hint = "name the folder of a finished run"
        raise usage_error("run", "a folder that exists", repr(run)[:60], hint)
    record = read_json(Path(run) / "config.json", "run")
    if not isinstance(record.get("settings"), dict) or not isinstance(record.get("splits"), dict):
        got = f"{run}/config.json without settings and splits"
        raise usage_error("run", "the configuration of a run", got, "name another folder")
    return record


def _models_of(run: str, epoch: str) -> list[Trained]:
    """Find the weights of every training of a run."""
    found = []
    for task in tasks_of(_settings_of(run)):
        weights = Path(run) / f"{task}{'-last' if epoch == 'last' else ''}.safetensors"
        if not path_exists(weights):
            hint = "finish the run first"
            raise usage_error("run", f"a finished one with {weights.name}", run, hint)
        found.append(Trained(Path(os.path.abspath(run)), task, weights))
    return found


def _tables(
    models: Sequence[Trained], folder: Path, id_split: str, said: Callable[[str], object]
) -> Iterator[tuple[Trained, HeadTable]]:
    """Yield the table of every model, from its file if there is one."""
    data: tuple[Path, Mapping[str, Any]] | None = None
    for model in models:
        record = _record_of(str(model.run))
        names = ["val_id", "val_ood", "test_id", "test_ood", *["train"] * (id_split == "train")]
        prints = {name: record["splits"].get(name) for name in names}
        key = json.dumps([digest_of(model.weights), prints], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        path = folder / f"{model.task}-{digest}.npz"
        if path_exists(path):
            said(f"{model.run.name}, {model.task}: table found")
            yield model, HeadTable.load(path)
            continue
        if data is None or data[0] != model.run:
            data = model.run, _load(model.run, prints)
        network = load_model(str(model.weights))
        table = table_of(network, {name: data[1][name] for name in names})
        table.save(path)
        said(f"{model.run.name}, {model.task}: table of {len(table.kept)} choices of heads")
        yield model, table


def _load(run: Path, prints: Mapping[str, Any]) -> Mapping[str, Any]:
    """Load the data of a run, and check that they are those it was trained with."""
    settings = _settings_of(str(run))
    splits = load_splits(settings.data, **settings.data_arguments())
    for name, wanted in prints.items():
        if wanted is None or fingerprint(splits[name])["sha256"] != wanted.get("sha256"):
            hint = "restore these data, or train again"
            wished = f"the data that {run} was trained with"
            raise usage_error("data", wished, f"another split {name}", hint)
    return splits


def _conditioned(table: HeadTable, conditions: Conditions) -> HeadTable:
    """Return the table with the splits ``id``, ``ood``, ``test_id`` and ``test_ood``."""
    splits = table.splits
    ident = splits[conditions.id_split]
    if conditions.label_noise:
        assert ident.labels is not None
        generator = torch.Generator().manual_seed(0)
        labels = noisy_labels(ident.labels, conditions.label_noise, table.classes, generator)
        ident = replace(ident, labels=labels)
    if conditions.shift:
        ood, test_id, test_ood = (splits[name] for name in ("val_ood", "test_id", "test_ood"))
    else:
        order = torch.randperm(len(splits["test_id"]), generator=torch.Generator().manual_seed(0))
        half = len(order) // 2
        ood = splits["test_id"].images(order[:half])
        test_id = test_ood = splits["test_id"].images(order[half:])
    chosen = {"id": ident, "ood": ood, "test_id": test_id, "test_ood": test_ood}
    return replace(table, splits=chosen)


def _compare(model: Trained, table: HeadTable) -> list[dict[str, Any]]:
    """What every rule chooses for one model, and what that reaches on the test sets."""
    found = []
    for pool in POOLS:
        pooled = table.single_heads() if pool == "single" else table
        tests = _tests(pooled)
        choices = torch.tensor(pooled.choices)
        best = int(choices[tests["test_ood"][choices].argmax()])
        tests["regret"] = tests["test_ood"][best] - tests["test_ood"]
        named = {"run": model.run.name, "method": model.task.method, "seed": model.task.seed}

        def row(rule: str, chosen: Sequence[int], refused: str = "") -> dict[str, Any]:
            values = {
                name: float(tests[name][list(chosen)].mean()) if chosen else None  # noqa: B023
                for name in MEASURES
            }
            heads = pooled.kept[chosen[0]] if len(chosen) == 1 else {}  # noqa: B023
            listed = " ".join(str(h) for kept in heads.values() for h in kept)
            where = {"pool": pool, "rule": rule, "heads": listed}  # noqa: B023
            return {**named, **where, **values, "refused": refused}  # noqa: B023

        found += [
            row("oracle: OOD test itself", [best]),
            row("no pruning", [0]),
            row("a choice at random", pooled.choices),
        ]
        for rule in rules():
            try:
                chosen = [rule.choose(pooled, seed) for seed in range(rule.draws)]
                found.append(row(rule.name, chosen))
            except UsageError as refused:
                found.append(row(rule.name, [], str(refused)))
    return found


def _tests(table: HeadTable) -> dict[str, Tensor]:
    """Test accuracies of every row, float64 ``[R]``."""
    ood = table.split("test_ood")
    hits = ood.hits.double()
    assert ood.groups is not None
    groups = [hits[:, ood.groups == group].mean(1) for group in ood.groups.unique()]
    return {
        "test_ood": hits.mean(1),
        "worst_group": torch.stack(groups).amin(0),
        "test_id": table.split("test_id").hits.double().mean(1),
    }


def _summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over models with a bootstrap interval, for every rule; paired with the baseline."""
    baseline = {_model(r): r for r in rows if r["rule"] == BASELINE}
    needs = {rule.name: rule.needs for rule in rules()}
    found = []
    for rule in dict.fromkeys(r["rule"] for r in rows):
        mine = [r for r in rows if r["rule"] == rule and r["regret"] is not None]
        refused = sum(r["rule"] == rule for r in rows) - len(mine)
        entry: dict[str, Any] = {"rule": rule, "needs": needs.get(rule, ""), "models": len(mine)}
        entry |= {"refused": refused}
        if mine:
            entry |= {name: _interval([r[name] for r in mine]) for name in MEASURES}
            pairs = [(r, baseline[_model(r)]) for r in mine]
            more = [r["regret"] - b["regret"] for r, b in pairs]
            entry["more_regret"] = _interval(more)
            entry["no_worse"] = entry["more_regret"][2] < MARGIN
            entry["win_tie_loss"] = [
                sum(x < -1e-9 for x in more),
                sum(abs(x) <= 1e-9 for x in more),
                sum(x > 1e-9 for x in more),
            ]
        found.append(entry)
    return found


def _model(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["run"], row["method"], row["seed"]


def _interval(values: Sequence[float]) -> list[float]:
    """The mean, and the 2.5 and 97.5 % points of means of resampled values."""
    given = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(given), (RESAMPLES, len(given)), generator=generator)
    means = given[drawn].mean(1)
    ends = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(x), 6) for x in (given.mean(), *ends)]


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for row in rows:
        cells = (row[name] for name in _CSV)
        writer.writerow(
            "" if c is None else f"{c:.6g}" if isinstance(c, float) else c for c in cells
        )
    return text.getvalue()
