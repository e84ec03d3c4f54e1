"""Recorded results of ``pytest benchmarks/``: rows, and the compact files that keep them."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MACHINE = ("device", "cpu", "cores", "threads", "torch", "triton", "cuda", "python", "commit")
"""Fields that all rows of a file have in common, and are written once."""
DETAILS = ("dtype", "shape", "first_order_only", "peak_bytes", "compile_seconds")
DIGITS = 6
"""Significant digits of a time in a file."""


class ReportError(Exception):
    """An error that the user can set right, in one line."""


@dataclass(frozen=True)
class Row:
    """One implementation of one group, with its time in each round, in seconds."""

    workload: str
    group: str
    implementation: str
    order: str
    times: tuple[float, ...]
    info: dict[str, Any]
    ratio: float | None = None  # its time over ours, by round, median; None: ours is not there

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def fifths(self) -> tuple[float, float]:
        """p20 and p80."""
        if len(self.times) < 2:
            return self.median, self.median
        cut = statistics.quantiles(self.times, n=5, method="inclusive")
        return cut[0], cut[-1]

    @property
    def label(self) -> str:
        return self.implementation + (
            " (first order only)" if self.info["first_order_only"] else ""
        )


def read(path: Path) -> list[Row]:
    """Read the rows of a file, be it compact or pytest-benchmark's own JSON.

    Raises:
        ReportError: not such a file, or one without rows of ours.
    """
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        rows = _from_pytest(recorded) if "benchmarks" in recorded else _from_compact(recorded)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path}: no results of benchmarks ({type(error).__name__})") from None
    if not rows:
        raise ReportError(f"{path}: holds no row of `pytest benchmarks/`")
    ours = {row.group: row.times for row in rows if row.implementation == "ours"}
    return [replace(row, ratio=_ratio(row.times, ours.get(row.group))) for row in rows]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows compactly: what reports show and no more, a row per line, the machine once."""
    machine = {key: rows[0].info.get(key) for key in MACHINE}
    head = json.dumps({"machine": machine}, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(_compact(row)) for row in rows)
    path.write_text(f'{head},\n "rows": [\n{lines}\n]\n}}\n', encoding="utf-8")


def _compact(row: Row) -> dict[str, Any]:
    return {
        **{"workload": row.workload, "group": row.group, "order": row.order},
        "implementation": row.implementation,
        **{key: row.info[key] for key in DETAILS if key in row.info},
        "seconds": [float(f"{t:.{DIGITS}g}") for t in row.times],
    }


def _from_compact(recorded: dict[str, Any]) -> list[Row]:
    return [_row(one, one["seconds"], recorded["machine"]) for one in recorded["rows"]]


def _from_pytest(recorded: dict[str, Any]) -> list[Row]:
    return [
        _row({**b["extra_info"], "group": b["group"]}, b["stats"]["data"])
        for b in recorded["benchmarks"]
        if "implementation" in b.get("extra_info", {}) and b["stats"]["data"]
    ]


def _row(
    one: dict[str, Any], seconds: Sequence[float], machine: dict[str, Any] | None = None
) -> Row:
    names = {key: one[key] for key in ("workload", "group", "implementation", "order")}
    info = {key: one[key] for key in (*MACHINE, *DETAILS) if key in one}
    return Row(**names, times=tuple(seconds), info={**(machine or {}), **info})


def _ratio(times: Sequence[float], ours: Sequence[float] | None) -> float | None:
    if not ours:
        return None
    if len(ours) == len(times):  # rounds are interleaved: compare within a round
        return statistics.median(t / o for t, o in zip(times, ours, strict=True))
    return statistics.median(times) / statistics.median(ours)
