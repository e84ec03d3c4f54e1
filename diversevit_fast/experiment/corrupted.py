"""``evaluate --corrupt``: all heads, the selected one and the best one on corrupted test images."""

import copy
import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from ..errors import require, usage_error
from .evaluate import evaluate
from .metrics import Row
from .run_files import check_new, write_json, write_text
from .tables import new_table, print_json, print_table

SPLITS = ("test_id", "test_ood")
CHOICES = ("all", "selected", "oracle")
COLUMNS = ("split", "corruption", "severity", "choice", "heads", "accuracy", "worst_group")


def evaluate_corrupted(
    model: Any,
    splits: Mapping[str, Any],
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    said: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """Evaluate three choices of the last layer's heads on clean and corrupted test images.

    The choices: ``all`` heads; the one ``selected`` on clean OOD validation, which has never seen a corruption; and the
    ``oracle``, the head that is best on those very images: an upper limit, no method.

    Args:
        model: see ``evaluate.evaluate``.
        splits: data sets of ``diversevit_fast.data``; ``val_ood``, ``test_id`` and ``test_ood`` are used.
        corruptions, severities: see ``data.corruptions``.
        said: is told what is evaluated next.

    Returns:
        Rows with the keys ``COLUMNS``; the corruption ``none`` has severity 0.
    """
    selected = _best(evaluate(model, splits["val_ood"], "val_ood"))["heads"]
    cells = [("none", 0), *((name, level) for name in corruptions for level in severities)]
    rows = []
    for name, severity in cells:
        said(f"{name}, severity {severity}" if severity else "no corruption")
        for split in SPLITS:
            data = splits[split]
            if severity:
                data = copy.copy(data)
                data.images = corrupt(splits[split].images, name, severity)
            found = evaluate(model, data, split)
            by_heads = {row["heads"]: row for row in found}
            chosen = (by_heads["all"], by_heads[selected], _best(found))
            rows += [
                {
                    **{"split": split, "corruption": name, "severity": severity},
                    **{"choice": choice, "heads": row["heads"]},
                    **{key: row[key] for key in ("accuracy", "worst_group")},
                }
                for choice, row in zip(CHOICES, chosen, strict=True)
            ]
    return rows


def _best(rows: Iterable[Row]) -> Row:
    """Return the row of the single head with the highest accuracy, the first at a tie."""
    return max((row for row in rows if row["heads"] != "all"), key=lambda row: row["accuracy"])


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON, or else as CSV, as the name's ending says."""
    if path.suffix == ".json":
        write_json(path, list(rows))
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row[name] for name in COLUMNS] for row in rows)
    write_text(path, text.getvalue())


def check_corrupted(corrupt: bool, out: str | None) -> Path | None:
    """Check the options of ``evaluate`` before any work, and return the file to write.

    Raises:
        UsageError: a file without ``--corrupt``, one that exists or has another ending, or no package to corrupt with.
    """
    if out is not None and not corrupt:
        raise usage_error("out", "it together with --corrupt", out, "add that, or leave it out")
    if corrupt:
        require("imagecorruptions", extra="corruptions")
    if out is None:
        return None
    if Path(out).suffix not in (".csv", ".json"):
        raise usage_error("out", "a name that ends in .csv or .json", repr(out), "add one")
    check_new("out", out)
    return Path(out)


def show_corrupted(rows: Sequence[Row], title: str, *, as_json: bool = False) -> None:
    """Print mean accuracies over severities by corruption, and over corruptions by severity; or every row as JSON."""
    if as_json:
        return print_json({"of": title, "rows": rows})
    print_table(
        title, new_table(), "selected: on clean OOD validation; oracle: on these very images"
    )
    for what, other in (("corruption", "severities"), ("severity", "corruptions")):
        for split in SPLITS:
            shown = new_table(what, *CHOICES)
            for value in dict.fromkeys(row[what] for row in rows):
                if value != 0:  # severity 0 is no corruption, which the other table has
                    kept = [r for r in rows if r["split"] == split and r[what] == value]
                    shown.add_row(str(value), *(_mean(kept, choice) for choice in CHOICES))
            print_table(f"{split}, accuracy, mean over {other}", shown, "")


def _mean(rows: Sequence[Row], choice: str) -> str:
    return f"{fmean(row['accuracy'] for row in rows if row['choice'] == choice):.3f}"
