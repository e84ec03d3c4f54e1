"""What programs share that keep what a page needs of a finished run, and write the page's tables from it."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.docs.support import between


def keep_run(
    program: str,
    description: str | None,
    result_of: Callable[[Path, str, Any], Any],
    file: Path | Callable[[Any], Path],
    arguments: Sequence[str] | None = None,
    timed: bool = True,
) -> None:
    """Write ``result_of(run, commit, cpu_seconds)`` to a file, if the command line names a run.

    Args:
        file: the file, or what names it, of the result.
        timed: whether the processor time has to be told.
    """
    parser = argparse.ArgumentParser(f"python -m tools.docs.{program}", description=description)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--cpu-seconds", type=float)
    given = parser.parse_args(arguments)
    if given.run is None:
        return
    if given.commit is None or (timed and given.cpu_seconds is None):
        parser.error("a run needs --commit" + " and --cpu-seconds" * timed)
    result = result_of(given.run, given.commit, given.cpu_seconds)
    path = file if isinstance(file, Path) else file(result)
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Write tables into a page, each between the markers of its name."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        text = between(text, name, lines)
    page.write_text(text, encoding="utf-8")
