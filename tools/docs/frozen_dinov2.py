"""Write docs/science/frozen_dinov2*.md from finished runs with a frozen trunk; try every subset of heads.

``python -m tools.docs.frozen_dinov2 RUN --commit HASH --cpu-seconds N`` keeps what a page needs of the folder RUN in
docs/science/results, in the file of the page of its data: comparison, verdicts, and what all heads, the best single
head and the best subset reach in each training, chosen on OOD validation after the last epoch. The run's data and
pretrained weights have to be where they were. Then, and without RUN, it writes the tables between the pages' markers.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from diversevit_fast.data import batches
from diversevit_fast.experiment.checkpoint import Task
from diversevit_fast.experiment.config import Settings, read_json
from diversevit_fast.experiment.frozen_trunk import inputs_of
from diversevit_fast.experiment.metrics import compare, read_csv
from diversevit_fast.experiment.models import TimmModel, described, number_of_heads
from diversevit_fast.experiment.progress import NAMES
from diversevit_fast.experiment.report import TITLES, verdict_sentence
from diversevit_fast.experiment.run import load, tasks_of
from diversevit_fast.experiment.verdict import mean_of_pairs, verdicts
from diversevit_fast.models import timm_last_block
from diversevit_fast.weight_files import read_tensors
from tools.docs.kept_run import keep_run, write_tables

ROOT = Path(__file__).parents[2]
SCIENCE = ROOT / "docs/science"
PAGES = {"mnist-cifar": "frozen_dinov2", "garments-places": "frozen_dinov2_garments"}
"""Data set -> name of its page and of its results."""

SPLITS = ("val_ood", "test_id", "test_ood")
PICKS = ("all", "single", "subset", "oracle")


def subsets(heads: int) -> list[tuple[int, ...]]:
    """Every subset but the empty one; larger ones first, so that ties keep more heads, then lower numbers."""
    return [c for size in range(heads, 0, -1) for c in combinations(range(heads), size)]


def factors(choices: Sequence[Sequence[int]], heads: int) -> Tensor:
    """What the heads' outputs are multiplied by in each choice ``[C, H]``: 0, or H / kept."""
    keep = torch.zeros(len(choices), heads)
    for row, choice in zip(keep, choices, strict=True):
        row[list(choice)] = heads / len(choice)
    return keep


def load_part(part: Any, vit: Any, path: Path) -> None:
    """Load last block, norm and head of a weight file into ``part``, a model ``without_trunk`` of ``vit``."""
    filed = read_tensors(path, "restore it")[1]
    own = part.state_dict()
    names = timm_last_block.whole_names(vit, own)
    part.load_state_dict(dict(zip(own, (filed[name] for name in names), strict=True)))


def accuracies(part: Any, split: Any, choices: Sequence[Sequence[int]]) -> Tensor:
    """The accuracy of every choice ``[C]``."""
    keep = factors(choices, number_of_heads(part))
    hits = [
        timm_last_block.head_logits(part, tokens, keep).argmax(-1) == labels
        for tokens, labels, _ in batches(split, 128)
    ]
    return torch.cat(hits, 1).double().mean(1)


def of_training(part: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What all heads, the chosen single head, the chosen subset and the best subset in hindsight reach."""
    choices = subsets(number_of_heads(part))
    found = {split: accuracies(part, inputs[split], choices) for split in SPLITS}
    single = [i for i, choice in enumerate(choices) if len(choice) == 1]
    picks = {
        "all": 0,
        "single": max(single, key=lambda i: found["val_ood"][i].item()),
        "subset": int(found["val_ood"].argmax()),
        "oracle": int(found["test_ood"].argmax()),
    }
    return {
        name: {
            "heads": list(choices[i]),
            **{split: round(found[split][i].item(), 4) for split in SPLITS},
        }
        for name, i in picks.items()
    }


def result_of(folder: Path, commit: str, cpu_seconds: float) -> dict[str, Any]:
    """What the page says of a finished run; processor seconds are of all its processes."""
    record = read_json(folder / "config.json", "config.json")
    settings = Settings.from_json(record["settings"])
    rows = read_csv(folder / "metrics.csv")
    cosines = read_json(folder / "cosines.json", "cosines.json")
    splits = load(settings)
    inputs = inputs_of(settings, splits, record["splits"], torch.device("cpu"), print)
    train = splits["train"]
    vit = TimmModel(settings, train.image_size, train.num_classes).whole().model
    last_part = timm_last_block.without_trunk(vit).eval()

    def training(task: Task) -> dict[str, Any]:
        load_part(last_part, vit, folder / f"{task}-last.safetensors")
        alike = round(mean_of_pairs(cosines[str(task)]["after"]), 4)
        found = of_training(last_part, inputs)
        return {"method": task.method, "seed": task.seed, "cosine": alike, **found}

    return {
        "commit": commit,
        "cpu_seconds": round(cpu_seconds),
        "model": described(settings),
        "settings": record["settings"],
        "samples": {name: facts["samples"] for name, facts in record["splits"].items()},
        "versions": {name: record["versions"][name] for name in ("torch", "timm")},
        "processor": record["machine"]["processor"],
        "compared": [
            [
                line.rule.heads,
                line.rule.chosen_on + (" (oracle)" if line.rule.oracle else ""),
                NAMES[line.method],
                *map(str, (line.test_id, line.test_ood, line.worst_group)),
            ]
            for line in compare(rows)
        ],
        "verdicts": [
            [TITLES[verdict.claim], verdict.said, verdict_sentence(verdict)]
            for verdict in verdicts(rows, cosines)
        ],
        "trainings": [training(task) for task in tasks_of(settings)],
    }


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the page's tables by the names of their markers."""
    settings, samples = Settings.from_json(result["settings"]), result["samples"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    facts = [
        f"* commit {result['commit']}, {versions}, {result['processor']}",
        f"* {result['model']}",
        f"* seeds {', '.join(map(str, settings.seeds))}; {settings.epochs} epochs; batches of "
        f"{settings.batch_size}; learning rate {settings.erm_lr:g} (ERM), {settings.lr:g} (DiverseViT); penalty "
        f"weight {settings.penalty_weight:g}",
        f"* images: {', '.join(f'{name} {count}' for name, count in samples.items())}",
        f"* {result['cpu_seconds']} s of processor time in all processes",
    ]
    compared = [
        "| heads | chosen on | method | ID test | OOD test | OOD worst group |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in result["compared"]),
    ]
    each = [
        "| method | seed | all heads | best head | best subset | its heads | best in hindsight | mean cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    means = [
        "| method | all heads | best head | best subset | best in hindsight |",
        "|---|---|---|---|---|",
    ]
    for method in settings.methods:
        mine = [one for one in result["trainings"] if one["method"] == method]
        for one in mine:
            reached = [f"{one[pick]['test_ood']:.3f}" for pick in PICKS]
            reached.insert(3, ", ".join(map(str, one["subset"]["heads"])))
            each.append(
                f"| {NAMES[method]} | {one['seed']} | {' | '.join(reached)} | {one['cosine']:.3f} |"
            )
        numbers = [f"{mean(one[pick]['test_ood'] for one in mine):.3f}" for pick in PICKS]
        means.append(f"| {NAMES[method]} | {' | '.join(numbers)} |")
    said = [f"* **{title}: {word}.** {sentence}" for title, word, sentence in result["verdicts"]]
    parts = {
        "facts": facts,
        "verdicts": said,
        "compared": compared,
        "means": means,
        "trainings": each,
    }
    return {name: "\n".join(lines) for name, lines in parts.items()}


def result_file(name: str) -> Path:
    """Where the results of a page are."""
    return SCIENCE / "results" / f"{name}.json"


def write_page(name: str) -> None:
    """Write the tables into a page."""
    result = json.loads(result_file(name).read_text(encoding="utf-8"))
    write_tables(SCIENCE / f"{name}.md", tables(result))


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep a run, if one is given, and write the pages."""
    keep_run(
        *("frozen_dinov2", __doc__, result_of),
        lambda result: result_file(PAGES[result["settings"]["data"]]),
        arguments,
    )
    for name in PAGES.values():
        write_page(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
