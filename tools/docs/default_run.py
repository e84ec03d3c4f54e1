"""Write the tables of docs/science/default_run.md from the pilot's lines and a finished run.

``python -m tools.docs.default_run RUN --commit HASH --cpu-seconds N`` keeps what the page needs of the
folder RUN in docs/science/results/default_run.json, and writes the tables between the page's markers.
Without RUN it writes them from what was kept.
"""

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diversevit_fast.experiment.config import Settings
from diversevit_fast.experiment.metrics import (
    RULES,
    SELECTED,
    Row,
    compare,
    find,
    of_run,
    present,
    read_csv,
)
from diversevit_fast.experiment.progress import NAMES
from diversevit_fast.experiment.report import TITLES, verdict_sentence
from diversevit_fast.experiment.verdict import mean_of_pairs, verdicts
from tools.docs.kept_run import keep_run, write_tables
from tools.pilot.cells import read_lines
from tools.pilot.choose import table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/science/default_run.md"
PILOT = ROOT / "docs/science/results/pilot.jsonl"
RESULT = ROOT / "docs/science/results/default_run.json"
KEPT = ("method", "seed", "epoch", "split", "heads", "accuracy", "worst_group")


def reduce_rows(rows: Sequence[Row]) -> list[Row]:
    """Keep the rows of a run from which comparison and verdicts follow, and no other."""
    methods, seeds = present(rows)
    kept: dict[tuple[Any, ...], Row] = {}
    for method in methods:
        for run in filter(None, (of_run(rows, method, seed) for seed in seeds)):
            wanted = [find(run, SELECTED.pick(run)["epoch"], "test_ood", "all")]
            for rule in RULES:
                picked = rule.pick(run)
                at = picked["epoch"], picked["heads"]
                tests = [find(run, at[0], split, at[1]) for split in ("test_id", "test_ood")]
                wanted += [picked, *tests]
            for row in wanted:
                short = {name: row[name] for name in KEPT}
                kept[tuple(short[name] for name in KEPT[:5])] = short
    return list(kept.values())


def result_of(folder: Path, commit: str, cpu_seconds: float | None) -> dict[str, Any]:
    """Return what the page says of a finished run; processor seconds are of all its processes."""
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cosines = json.loads((folder / "cosines.json").read_text(encoding="utf-8"))
    return {
        "commit": commit,
        "cpu_seconds": None if cpu_seconds is None else round(cpu_seconds),
        "settings": record["settings"],
        "splits": {
            name: {"samples": split["samples"], **split["independent"], "groups": split["groups"]}
            for name, split in record["splits"].items()
        },
        "versions": record["versions"],
        "processor": record["machine"]["processor"],
        "cosines": {task: {"after": matrices["after"]} for task, matrices in cosines.items()},
        "rows": [list(row.values()) for row in reduce_rows(read_csv(folder / "metrics.csv"))],
    }


def agreement(groups: Mapping[str, int]) -> float:
    """Return the share of images whose digit agrees with the label; groups in the order of ``group``."""
    counts = list(groups.values())
    return (counts[0] + counts[3]) / sum(counts)


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """Return the rows that were kept."""
    return [dict(zip(KEPT, values, strict=True)) for values in result["rows"]]


def run_tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of any run by the names of their markers: verdicts, the comparison, each training."""
    rows = rows_of(result)
    said = [
        _wrapped(f"* **{TITLES[verdict.claim]}: {verdict.said}.** {verdict_sentence(verdict)}")
        for verdict in verdicts(rows, result["cosines"])
    ]
    compared = [
        "| heads | chosen on | method | ID test | OOD test | OOD worst group |",
        "|---|---|---|---|---|---|",
    ]
    for line in compare(rows):
        chosen_on = line.rule.chosen_on + (" (oracle)" if line.rule.oracle else "")
        numbers = f"{line.test_id} | {line.test_ood} | {line.worst_group}"
        compared.append(f"| {line.rule.heads} | {chosen_on} | {NAMES[line.method]} | {numbers} |")
    each = [
        "| method | seed | epoch, head | selected head | all heads | mean cosine |",
        "|---|---|---|---|---|---|",
    ]
    methods, seeds = present(rows)
    for method in methods:
        for seed in seeds:
            run = of_run(rows, method, seed)
            picked = SELECTED.pick(run)
            at = picked["epoch"], "test_ood"
            alone, whole = find(run, *at, picked["heads"]), find(run, *at, "all")
            alike = mean_of_pairs(result["cosines"][f"{method}-seed{seed}"]["after"])
            each.append(
                f"| {NAMES[method]} | {seed} | {picked['epoch']}, {picked['heads']} "
                f"| {alone['accuracy']:.3f} | {whole['accuracy']:.3f} | {alike:.3f} |"
            )
    parts = {"verdicts": said, "compared": compared, "trainings": each}
    return {name: "\n".join(lines) for name, lines in parts.items()}


def recipe(result: Mapping[str, Any]) -> str:
    """Return a line with the seeds, epochs, learning rates and the penalty's weight of a run."""
    settings = Settings.from_json(result["settings"])
    return (
        f"* seeds {', '.join(map(str, settings.seeds))}; {settings.epochs} epochs; learning rate "
        f"{settings.base_lr('erm'):g} (ERM), {settings.base_lr('diversevit'):g} (DiverseViT); penalty "
        f"weight {settings.penalty_weight:g}"
    )


def tables(pilot: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> dict[str, str]:
    """Return the page's tables by the names of their markers."""
    shown = result["splits"]["test_ood"]
    facts = [
        f"* commit {result['commit']}, torch {result['versions']['torch']}, {result['processor']}",
        recipe(result),
        f"* {shown['samples']} OOD test images of {shown['photographs']} tiles and {shown['digits']} digits; "
        f"the digit agrees with the label in {agreement(shown['groups']):.1%} of them",
        f"* {result['cpu_seconds']} s of processor time in all processes",
    ]
    return {"pilot": table(pilot), "facts": "\n".join(facts), **run_tables(result)}


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False)


def write_page() -> None:
    """Write the tables into the page."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    write_tables(PAGE, tables(read_lines(PILOT), result))


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep a run, if one is given, and write the page."""
    keep_run("default_run", __doc__, result_of, RESULT, arguments)
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
