"""Write ``report.html``, one self-contained page, rebuilt at any time from a run's folder."""

import base64
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, require, usage_error
from ..files import writing
from .head_probes import read_probes
from .head_section import HeadSection
from .metrics import Line, Row, compare, present, write_csv
from .models import described
from .origin import in_one_piece, origins, schedule_in_words
from .plots import PICTURES, draw
from .progress import NAMES
from .recipe import OPTIMIZER_NAMES
from .run_files import out_of_memory, printable, write_text
from .several import Trainings, read_finished
from .verdict import LEVEL, Verdict, mean_of_pairs, verdicts

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
TITLES = {
    "prune": "Pruning to the selected head helps",
    "differ": "The penalty makes heads read differently",
    "better": "The penalty makes the selected head better",
}
ONE_METHOD = "What compares two methods cannot be judged here: this run trained one."
_COMPARED = {
    "prune": "With the same weights, the selected head reaches {a} on the OOD test set, all heads {b}",
    "differ": "The mean absolute cosine of two heads’ gradients is {a} after DiverseViT, {b} after ERM",
    "better": "The selected head reaches {a} on the OOD test set after DiverseViT, {b} after ERM",
}
_ALTERNATIVES = ("Training curves", "Scatter plot of heads", "Cosine matrices")


def write_report(folder: Path) -> Path:
    """Draw the pictures and write the page from ``metrics.csv``, ``config.json``, ``cosines.json``, and probes.

    Raises:
        UsageError: one of them is missing, damaged, or of no run.
    """
    page = folder / "report.html"
    _write(read_finished(folder), page, folder, probed=True)
    return page


def write_page(trainings: Trainings, page: Path) -> None:
    """Write the page of trainings that no finished run's folder holds, and their rows beside it (``.csv``).

    Raises:
        UsageError: the values are damaged, or the system refuses.
    """
    with tempfile.TemporaryDirectory() as pictures:
        _write(trainings, page, Path(pictures))
    write_csv(trainings.rows, page.with_suffix(".csv"))


def _write(trainings: Trainings, page: Path, pictures: Path, probed: bool = False) -> None:
    require("jinja2", extra="train")
    try:
        draw(trainings.rows, trainings.cosines, pictures)
        heads = _heads(trainings.rows, pictures) if probed else None
        text = _render(page, trainings, pictures, heads)
    except UsageError:
        raise
    except Exception as failure:  # values that are no run's can break anything
        if out_of_memory(failure):
            with writing(page):
                raise MemoryError from None
        got = f"incomplete ones ({type(failure).__name__}: {failure})"
        hint = "mend that, or repeat the run"
        wanted = f"the files of a run in {trainings.name}"
        raise usage_error("report", wanted, got, hint) from None
    write_text(page, text)


def _heads(rows: Sequence[Row], folder: Path) -> HeadSection:
    """Draw the probes that lie in the folder of a run."""
    methods, seeds = present(rows)
    return HeadSection.of(
        rows, read_probes(folder, [f"{m}-seed{s}" for m in methods for s in seeds]), folder
    )


def _render(page: Path, trainings: Trainings, folder: Path, heads: HeadSection | None) -> str:
    rows, settings, cosines = trainings.rows, trainings.settings, trainings.cosines
    lines = compare(rows)
    jinja = require("jinja2", extra="train")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["names"] = NAMES.get
    environment.filters["optimizers"] = OPTIMIZER_NAMES.get
    methods, seeds = present(rows)
    return environment.get_template("report.html.jinja").render(
        title=printable(page.stem if page.name != "report.html" else trainings.name),
        settings=settings,
        record=trainings.record,
        missing=list(map(printable, trainings.missing)),
        parts=[_part(part) for part in trainings.parts],
        table=page.with_suffix(".csv").name if page.name != "report.html" else "metrics.csv",
        schedule=schedule_in_words(settings, trainings.record),
        origins=list(map(printable, origins(trainings.record))),
        in_one_piece=in_one_piece(settings, trainings.record),
        methods=methods,
        seeds=seeds,
        model=described(settings),
        start=_start(trainings.record),
        tables=_tables(lines, settings.data == "mnist-cifar"),
        one_method=ONE_METHOD,
        verdicts=[(TITLES[v.claim], v.said, verdict_sentence(v)) for v in verdicts_of(trainings)],
        likeness=_likeness(cosines),
        seconds=sum(row["seconds"] for row in _timed(rows)),
        pictures=_pictures(folder, zip(PICTURES, _ALTERNATIVES, _CAPTIONS, strict=True)),
        heads=heads,
        head_pictures=_pictures(folder, heads.pictures if heads else ()),
    )


def _start(record: Mapping[str, Any]) -> str:
    """Return which weights trainings began with; empty for random ones, and for runs that do not say."""
    if "start" not in record:
        return ""
    digest = record["model"]["sha256"]
    said = "weights of {weights} (SHA-256 {digest}); classifier: {classifier}"
    return printable(said.format(digest=digest, **record["start"]))


def _pictures(folder: Path, drawn: Iterable[tuple[str, str, str]]) -> list[dict[str, str]]:
    """Return what the page shows of pictures: content, and words for those who do not see it."""
    return [
        {"source": _embed(folder / file), "alternative": alternative, "caption": caption}
        for file, alternative, caption in drawn
    ]


def verdicts_of(trainings: Trainings) -> list[Verdict]:
    """Return the verdicts that the finished trainings allow."""
    finished = trainings.finished()
    return verdicts(finished.rows, finished.cosines) if finished.rows else []


def _part(run: Trainings) -> dict[str, Any]:
    """Return, for the page, what one of several runs trained, and where."""
    methods, seeds = present(run.rows)
    return {
        "name": printable(run.name),
        "methods": methods,
        "seeds": seeds,
        "record": run.record,
    }


def verdict_sentence(verdict: Verdict) -> str:
    """Return what is compared, by how much it differs, and what an exact test over trainings says."""
    a, b = verdict.means
    compared = _COMPARED[verdict.claim].format(a=f"{a:.3f}", b=f"{b:.3f}")
    interval = ""
    if verdict.interval is not None:
        low, high = verdict.interval
        interval = f" (95 % interval {low:+.3f} to {high:+.3f})"
    n, m = verdict.trainings
    trainings = f"{n} trainings" if verdict.claim == "prune" else f"{n} and {m} trainings"
    size = f"{compared}: a difference of {verdict.difference:+.3f}{interval}, p = {verdict.p:.2g} over {trainings}"
    if verdict.said != "cannot tell":
        return f"{size}."
    if verdict.least_p >= LEVEL:
        reason = f"so few cannot decide, whatever they show: the smallest p they can give is {verdict.least_p:.2g}"
    elif verdict.detectable:
        reason = (
            f"a difference of about {verdict.detectable:.3f} would be decided in 80 % of such runs"
        )
    else:
        reason = "there is none"
    return f"{size}; {reason}."


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
    return [
        {
            "method": NAMES[task.partition("-")[0]],
            "seed": task.rpartition("seed")[2],
            "before": mean_of_pairs(matrices["before"]),
            "after": mean_of_pairs(matrices["after"]),
        }
        for task, matrices in cosines.items()
    ]


def _timed(rows: Sequence[Row]) -> list[Row]:
    """Return one row per training pass and one per evaluation, which repeats its time in each row."""
    return [r for r in rows if (r["split"], r["heads"]) in (("train", "all"), ("val_id", "all"))]


def _embed(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
