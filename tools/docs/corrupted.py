"""Write docs/science/corruptions.md from ``diversevit evaluate --corrupt --out FILE.json`` of several trainings.

``python -m tools.docs.corrupted FOLDER --commit HASH --cpu-seconds N`` keeps, in docs/science/results/corruptions.json,
means over corruptions and over severities of the files METHOD-seedN.json in FOLDER. Then, and without FOLDER, it writes
the tables between the page's markers.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from diversevit_fast.data.corruptions import CORRUPTIONS, SEVERITIES
from diversevit_fast.experiment.corrupted import CHOICES, SPLITS
from diversevit_fast.experiment.progress import NAMES
from tools.docs.kept_run import keep_run, write_tables

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/science/corruptions.md"
RESULT = ROOT / "docs/science/results/corruptions.json"


def of_training(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean accuracies of one training, by split and choice: at each severity, and of each corruption."""

    def mean(split: str, choice: str, **wanted: Any) -> float:
        wanted |= {"split": split, "choice": choice}
        found = [r["accuracy"] for r in rows if all(r[key] == x for key, x in wanted.items())]
        return round(fmean(found), 4)

    return {
        split: {
            choice: {
                "severities": [mean(split, choice, severity=x) for x in (0, *SEVERITIES)],
                "corruptions": {x: mean(split, choice, corruption=x) for x in CORRUPTIONS},
            }
            for choice in CHOICES
        }
        for split in SPLITS
    }


def result_of(folder: Path, commit: str, cpu_seconds: float) -> dict[str, Any]:
    """What the page says of the files in a folder; processor seconds are of all evaluations."""
    trainings = []
    for file in sorted(folder.glob("*-seed*.json")):
        method, seed = file.stem.split("-seed")
        rows = json.loads(file.read_text(encoding="utf-8"))
        trainings.append({"method": method, "seed": int(seed), **of_training(rows)})
    return {"commit": commit, "cpu_seconds": round(cpu_seconds), "trainings": trainings}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the page's tables by the names of their markers."""
    trainings = result["trainings"]
    levels = " | ".join(map(str, (0, *SEVERITIES)))
    by_severity = [
        f"| test set | method | heads | {levels} |",
        "|---" * (4 + len(SEVERITIES)) + "|",
    ]
    for split in SPLITS:
        for method in dict.fromkeys(x["method"] for x in trainings):
            mine = [x[split] for x in trainings if x["method"] == method]
            for choice in CHOICES:
                each = zip(*(x[choice]["severities"] for x in mine), strict=True)
                cells = " | ".join(f"{fmean(values):.3f}" for values in each)
                name = split.removeprefix("test_").upper()
                by_severity.append(f"| {name} | {NAMES[method]} | {choice} | {cells} |")
    by_corruption = [
        "| corruption | " + " | ".join(f"OOD, {choice}" for choice in CHOICES) + " |",
        "|---" * (1 + len(CHOICES)) + "|",
    ]
    for name in CORRUPTIONS:
        means = [fmean(x["test_ood"][c]["corruptions"][name] for x in trainings) for c in CHOICES]
        by_corruption.append(f"| {name} | {' | '.join(f'{x:.3f}' for x in means)} |")
    seeds = ", ".join(map(str, sorted({x["seed"] for x in trainings})))
    facts = [
        f"* commit {result['commit']}; seeds {seeds} of both methods",
        f"* {result['cpu_seconds']} s of processor time for the evaluations",
    ]
    parts = {"severities": by_severity, "corruptions": by_corruption, "facts": facts}
    return {name: "\n".join(lines) for name, lines in parts.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep results, if a folder is given, and write the page."""
    keep_run("corrupted", __doc__, result_of, RESULT, arguments)
    write_tables(PAGE, tables(json.loads(RESULT.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
