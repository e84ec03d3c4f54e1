"""Measure a GPU within a budget, and go on where the last run ended.

    python -m tools.measure_gpu --minutes 9 [--results FILE] [--only PATTERN] [--unchecked] [--list]

Measurements run in the order of ``measurements.names()``, each in a process of its own, and each result is written as
soon as it is there. What the results hold of the same commit is not measured again; nothing starts that the budget has
no time for. ``--unchecked`` leaves out the correctness checks, which a GPU that computes nothing cannot pass; such
results say so.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from diversevit_fast.files import write_atomically

from . import measurements

ROOT = Path(__file__).parents[2]
SLACK_SECONDS = 20.0
"""A measurement starts only if the budget has at least this left."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    parser.add_argument("--only", default="", help="measurements whose name holds this")
    parser.add_argument("--unchecked", action="store_true", help="without correctness checks")
    parser.add_argument("--list", action="store_true", help="only print the names")
    options = parser.parse_args(arguments)
    names = [name for name in measurements.names() if options.only in name]
    if options.list:
        print("\n".join(names))
        return 0
    end = time.monotonic() + 60 * options.minutes
    results = read(options.results)
    commit = measurements.commit()
    for name in names:
        known = results.get(name)
        if known is not None and known["commit"] == commit and "failed" not in known:
            continue
        left = end - time.monotonic()
        if left < SLACK_SECONDS:
            print(f"the budget is spent before: {name}")
            return 3
        results[name] = {"commit": commit, **measure(name, options.unchecked, left)}
        write(options.results, results)
        print(f"{name}: {json.dumps(results[name])[:200]}", flush=True)
    return 0


def measure(name: str, unchecked: bool, seconds: float) -> dict[str, Any]:
    """Return the result of one measurement, or ``failed`` with the end of what its process said."""
    command = [sys.executable, "-m", "tools.measure_gpu.measurements", name]
    if unchecked:
        command.append("--unchecked")
    begun = time.monotonic()
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {seconds:.0f} s, when the budget was spent"}
    taken = round(time.monotonic() - begun, 1)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
    if ran.returncode or not lines:
        return {"failed": (ran.stdout + ran.stderr)[-1500:], "seconds": taken}
    return {**json.loads(lines[-1].removeprefix("RESULT ")), "seconds": taken}


def read(path: Path) -> dict[str, Any]:
    """Return the results so far; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results, the file whole or not at all."""
    text = compact(results).encode()
    write_atomically(path, lambda file: file.write(text))


def compact(results: dict[str, Any]) -> str:
    """JSON with one measurement a line."""
    rows = (f"{json.dumps(name)}: {json.dumps(one)}" for name, one in results.items())
    return "{\n" + ",\n".join(rows) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
