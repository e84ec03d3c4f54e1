"""Write ``report.html``, one self-contained page, rebuilt at any time from a run's folder."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, require, usage_error
from ..files import writing
from .config import Settings, read_json
from .metrics import Claim, Line, Row, compare, judge, present, read_csv
from .plots import PICTURES, draw
from .progress import NAMES
from .run_files import out_of_memory, printable, write_text

# OOD test, arXiv 2308.16274, MNIST-CIFAR, 10 seeds; by index in metrics.RULES and method
PUBLISHED = {
    (0, "erm"): "0.568",
    (0, "diversevit"): "0.585",
    (1, "erm"): "0.627 ± 0.010",
    (1, "diversevit"): "0.646 ± 0.017",
    (2, "erm"): "0.645 ± 0.030",
    (2, "diversevit"): "0.704 ± 0.017",
}
_CAPTIONS = (
    "Training. Thin lines are seeds, thick lines their mean. “Best head” is, at each epoch, the "
    "head with the highest accuracy on OOD validation, measured on the OOD test set.",
    "Every head of the last layer alone, and all heads together, on both test sets.",
    "How alike the heads’ gradients are on the first images of ID validation: 0 is orthogonal, "
    "1 parallel. The penalty of DiverseViT pushes the squares of these cosines down.",
)
_ALTERNATIVES = ("Training curves", "Scatter plot of heads", "Cosine matrices")


def write_report(folder: Path) -> Path:
    """Draw the pictures and write the page from ``metrics.csv``, ``config.json``, ``cosines.json``.

    Raises:
        UsageError: one of them is missing, damaged, or of no run.
    """
    rows = read_csv(folder / "metrics.csv")
    record = read_json(folder / "config.json", "config.json")
    cosines = read_json(folder / "cosines.json", "cosines.json")
    require("jinja2", extra="train")
    try:
        lines = compare(rows)
        settings = Settings.from_json(record["settings"])
        claim = judge(lines, record["splits"]["test_ood"]["samples"])
        draw(rows, cosines, folder)
        page = _render(folder.name, rows, lines, claim, settings, record, cosines, folder)
    except UsageError:
        raise
    except Exception as failure:  # values that are no run's can break anything
        if out_of_memory(failure):
            with writing(folder / "report.html"):
                raise MemoryError from None
        got = f"incomplete ones ({type(failure).__name__}: {failure})"
        hint = "mend that, or repeat the run"
        raise usage_error("report", f"the files of a run in {folder}", got, hint) from None
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _render(
    name: str,
    rows: Sequence[Row],
    lines: Sequence[Line],
    claim: Claim | None,
    settings: Settings,
    record: Mapping[str, Any],
    cosines: Mapping[str, Any],
    folder: Path,
) -> str:
    jinja = require("jinja2", extra="train")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["names"] = NAMES.get
    methods, seeds = present(rows)
    return environment.get_template("report.html.jinja").render(
        title=printable(name.removesuffix(".partial")),
        settings=settings,
        record=record,
        methods=methods,
        seeds=seeds,
        tables=_tables(lines, settings.data == "mnist-cifar"),
        claim=claim,
        sentence=claim_sentence(claim, len(seeds)),
        likeness=_likeness(cosines),
        seconds=sum(row["seconds"] for row in _timed(rows)),
        pictures=[
            {"source": _embed(folder / file), "alternative": alternative, "caption": caption}
            for file, alternative, caption in zip(PICTURES, _ALTERNATIVES, _CAPTIONS, strict=True)
        ],
    )


def claim_sentence(claim: Claim | None, seeds: int) -> str:
    """Return one or two sentences that say if the paper's claim shows in this run."""
    if claim is None:
        return (
            "The claim compares two methods and this run trained one, so it cannot be judged here."
        )
    size = (
        f"DiverseViT’s selected head reaches {claim.diversevit.mean:.3f} on the OOD test set, "
        f"ERM’s {claim.erm.mean:.3f}: a difference of {claim.difference:+.3f} against a spread of "
        f"{claim.spread:.3f}"
    )
    verdicts = {
        "shows": "the claim shows in this run",
        "does not show": "the claim does not show in this run, the difference is within the spread",
        "is contradicted": "this run contradicts the claim, ERM’s head is better",
    }
    few = " One seed says nothing about other seeds." if seeds == 1 else ""
    return f"{size}; {verdicts[claim.verdict]}.{few}"


def _tables(lines: Sequence[Line], with_published: bool) -> list[dict[str, Any]]:
    """Return one table per selection rule, with methods as rows."""
    rules = list(dict.fromkeys(line.rule for line in lines))
    return [
        {
            "rule": rule,
            "rows": [
                {
                    "line": line,
                    "published": PUBLISHED.get((index, line.method), "")
                    if with_published
                    else None,
                    "chosen": "; ".join(
                        f"seed {seed}: epoch {epoch}"
                        + ("" if heads == "all" else f", head {heads}")
                        for seed, epoch, heads in line.chosen
                    ),
                }
                for line in lines
                if line.rule is rule
            ],
        }
        for index, rule in enumerate(rules)
    ]


def _likeness(cosines: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the mean absolute cosine over pairs of different heads, per training, before and after."""

    def mean(matrix: Sequence[Sequence[float]]) -> float:
        pairs = [x for i, row in enumerate(matrix) for j, x in enumerate(row) if i != j]
        return sum(pairs) / len(pairs) if pairs else 0.0

    return [
        {
            "method": NAMES[task.partition("-")[0]],
            "seed": task.rpartition("seed")[2],
            "before": mean(matrices["before"]),
            "after": mean(matrices["after"]),
        }
        for task, matrices in cosines.items()
    ]


def _timed(rows: Sequence[Row]) -> list[Row]:
    """Return one row per training pass and one per evaluation, which repeats its time in each row."""
    return [r for r in rows if (r["split"], r["heads"]) in (("train", "all"), ("val_id", "all"))]


def _embed(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
