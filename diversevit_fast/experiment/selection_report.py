"""The tables of ``selection-study`` as Markdown, made from its JSON record alone."""

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {"single": "One head", "subsets": "Any subset of the heads"}
_HEAD = (
    *("rule", "looks at", "models (refused)", "OOD test", "worst group", "ID test"),
    *("regret", "regret − that of OOD validation", "win/tie/loss"),
)


def markdown(record: Mapping[str, Any]) -> str:
    """Return a table for single heads and one for subsets."""
    parts = [_conditions(record)]
    for pool, entries in record["pools"].items():
        parts += [f"**{TITLES[pool]}**", table(entries)]
    return "\n\n".join(parts) + "\n"


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return one Markdown table, a line for every rule."""
    lines = [_line(_HEAD), _line("---" for _ in _HEAD)]
    for entry in entries:
        count = f"{entry['models']} ({entry['refused']})"
        cells = [entry["rule"], entry["needs"] or "—", count]
        if entry["models"]:
            cells += [f"{entry[name][0]:.3f}" for name in ("test_ood", "worst_group", "test_id")]
            cells += [_interval(entry["regret"]), _signed(entry["more_regret"])]
            cells.append("/".join(map(str, entry["win_tie_loss"])))
        else:
            cells += ["—"] * 6
        lines.append(_line(cells))
    return "\n".join(lines)


def across(records: Mapping[str, Mapping[str, Any]], pool: str) -> str:
    """Return a Markdown table of the mean regret of every rule in several studies, by their names."""
    found = {
        name: {entry["rule"]: entry for entry in record["pools"][pool]}
        for name, record in records.items()
    }
    lines = [_line(["rule", *found]), _line("---" for _ in range(len(found) + 1))]
    for rule in dict.fromkeys(rule for entries in found.values() for rule in entries):
        cells = [_regret(entries.get(rule)) for entries in found.values()]
        lines.append(_line([rule, *cells]))
    return "\n".join(lines)


def _regret(entry: Mapping[str, Any] | None) -> str:
    if entry is None or not entry["models"]:
        return "refused" if entry else "—"
    refused = f" ({entry['refused']} refused)" if entry["refused"] else ""
    return f"{entry['regret'][0]:.3f}{refused}"


def _conditions(record: Mapping[str, Any]) -> str:
    given = record["conditions"]
    parts = [
        f"{len(record['models'])} models",
        f"weights of the {given['epoch']} epoch",
        f"ID data: {given['id_split']}",
        f"wrong labels among them: {100 * given['label_noise']:g} %",
        "OOD data: " + ("shifted" if given["shift"] else "in-distribution, no shift"),
    ]
    return "; ".join(parts) + "."


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _signed(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
