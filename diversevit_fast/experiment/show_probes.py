"""The command ``diversevit probe``: probe weights, or all of a run, and print a table for each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import require, usage_error
from ..probes.head_probes import HeadProbes
from .config import is_path
from .head_probes import SPLIT, probe_weights, probes_path
from .metrics import EVALUATED, SPLIT_NAMES
from .trained_model import splits_for

_MEASURES = {
    "use": "use",
    "zero": "without",
    "decode": "decoded",
    "mass": "attention",
    "swap": "swapped",
}
_LEGEND = (
    "use: agreement of the head alone with {pair}; same: share of its most frequent prediction; without: what is lost "
    "(-) without it; decoded: linear probe of its output; attention: to the part of the image; swapped: "
    "predictions that change with the part"
)


def check_probe_options(target: str, layers: str, split: str) -> list[Path]:
    """Return the files of weights that ``target`` names: itself, or those of selected epochs in a run's folder.

    Raises:
        UsageError: none, or unknown words.
    """
    if not is_path(target):
        raise usage_error("weights", "a file or the folder of a run", repr(target), "name it")
    for name, value, words in (("layers", layers, ("last", "all")), ("split", split, EVALUATED)):
        if value not in words:
            raise usage_error(name, f"one of {', '.join(words)}", repr(value), "pick one of these")
    path = Path(target)
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.glob("*.safetensors") if not p.stem.endswith("-last"))
    if not found:
        hint = "name the folder of a run, or a file of weights"
        raise usage_error("weights", "a run with weights (.safetensors)", target, hint)
    return found


def show_probes(
    files: list[Path],
    load: Callable[[Path], Any],
    options: Mapping[str, Any],
    config: str | None,
    layers: str = "last",
    split: str = SPLIT,
) -> None:
    """Probe the files, which ``load`` reads, print a table for each, and what each method's heads are like."""
    console = require("rich.console", extra="train").Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    splits: Any = None
    every: dict[str, list[HeadProbes]] = {}
    for path in files:
        model = load(path)
        if splits is None:
            splits, named = splits_for(str(path), options, config, model)
            say(f"{SPLIT_NAMES[split]} of {named}, {len(splits[split])} images")
        probes, there = probe_weights(path, model, splits, layers=layers, split=split, swaps=True)
        every.setdefault(path.stem.partition("-seed")[0], []).append(probes)
        say(f"{path.stem}{', probed before' if there else ''}")
        console.print(_table(probes))
        say(str(probes_path(path)))
    first = next(iter(every.values()))[0]
    say(_LEGEND.format(pair=" and ".join(first.values)))
    if len(files) > 1 and "kind" in first.table[0]:
        for name, found in every.items():
            say(f"{name}: {summary(found)}")


def summary(found: list[HeadProbes]) -> str:
    """Return mean specialisation, and the mean number of heads of each kind."""
    kinds = {kind: sum(p.counts[kind] for p in found) / len(found) for kind in found[0].counts}
    special = [p.specialisation for p in found if p.specialisation == p.specialisation]
    mean = f"{sum(special) / len(special):.3f}" if special else "none (no head is live)"
    counted = ", ".join(f"{count:.1f} {kind}" for kind, count in kinds.items())
    return f"specialisation {mean}; heads of a model: {counted}"


def _table(probes: HeadProbes) -> Any:
    table = require("rich.table", extra="train").Table(box=None, padding=(0, 1, 0, 0))
    attributes = list(probes.values)
    row = probes.table[0]
    shown = {
        name: [f"{name}_{a}" for a in attributes if f"{name}_{a}" in row] for name in _MEASURES
    }
    shown = {name: columns for name, columns in shown.items() if columns}
    names = ["layer", "head", *(["kind"] if "kind" in row else []), "same"]
    for i, name in enumerate([*names, *(_MEASURES[name] for name in shown)]):
        table.add_column(
            name, justify="left" if i == 2 and "kind" in row else "right", no_wrap=True
        )
    for row in probes.table:
        kind = [row["kind"]] if "kind" in row else []
        cells = [
            " ".join(_number(row[column], signed=name == "zero") for column in columns)
            for name, columns in shown.items()
        ]
        table.add_row(
            str(row["layer"]), str(row["head"]), *kind, _number(row["prevalence"]), *cells
        )
    return table


def _number(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"
