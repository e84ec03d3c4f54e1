"""``config.json`` of a run: read and checked, and what changed since the run began."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import usage_error
from ..files import path_exists
from .config import MOST_THREADS, Settings, read_json
from .distributed import OneProcess
from .machine import changes, describe_machine, versions
from .run_folder import Place


def record_of_unfinished(place: Place) -> dict[str, Any]:
    """Return ``config.json`` of an unfinished run.

    Raises:
        UsageError: there is none, or it is finished.
    """
    if not path_exists(place.partial):
        got = f"{place.out}, which is finished" if place.finished else f"no folder {place.partial}"
        hint = "check the path, or start a run with --out"
        if place.finished:
            hint = f"open its report.html; for more epochs: --continue {place.out} --epochs N"
        raise usage_error("resume", "an unfinished run", got, hint)
    if path_exists(place.out):
        raise usage_error(
            "resume", f"no finished folder {place.out}", "one that exists", "move it away first"
        )
    return read_record(place.record, "resume")


def read_record(path: Path, argument: str) -> dict[str, Any]:
    """Read ``config.json`` of a run.

    Args:
        argument: begins the errors.

    Raises:
        UsageError: it cannot be read, or lacks what a run needs to go on.
    """
    record = read_json(path, argument)
    ranks = record.get("ranks", [1])
    for name, fits in (
        ("settings", isinstance(record.get("settings"), dict)),
        ("threads", type(record.get("threads")) is int and 0 < record["threads"] <= MOST_THREADS),
        (
            "ranks",
            isinstance(ranks, list) and ranks and all(type(n) is int and n > 0 for n in ranks),
        ),
        ("versions", isinstance(record.get("versions"), dict)),
        ("resumed_with", isinstance(record.get("resumed_with", {}), dict)),
        ("machine", isinstance(record.get("machine"), dict)),
    ):
        if not fits:
            got = f"{path} without {name}"
            raise usage_error(argument, "the configuration of a run", got, "start a new run")
    return record


def settings_of(record: Mapping[str, Any]) -> Settings:
    """Return the settings of a run; one of a version that kept no checkpoints keeps none."""
    return Settings.from_json({"keep_checkpoints": False, **record.get("settings", {})})


def note_changes(record: dict[str, Any], ranks: OneProcess) -> list[str]:
    """Record in ``record`` what changed since the run began; return the lines that say so."""
    counts, notes = record.get("ranks", [1]), []
    if counts[-1] != ranks.count:
        record["ranks"] = [*counts, ranks.count]
        notes.append(f"resumed by {ranks.count} instead of {counts[-1]} ranks")
    known = platform_of(record["versions"], record["machine"]) | record.get("resumed_with", {})
    now = platform_of(versions(), describe_machine())
    new = {name: version for name, version in now.items() if known.get(name) != version}
    if new:
        record["resumed_with"] = record.get("resumed_with", {}) | new
        notes.append(changes("resumed with", known, new))
    return notes


def platform_of(versions: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by name, what rounding depends on."""
    return {**versions, **{name: machine.get(name) for name in ("processor", "gpu")}}
