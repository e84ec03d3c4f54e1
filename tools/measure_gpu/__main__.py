"""Measure a GPU within a budget, and go on where the last run ended.

    python -m tools.measure_gpu --minutes 9 [--results FILE] [--only PATTERN] [--list]
    python -m benchmarks.report benchmarks/results/gpu.json

Measurements run in the order of ``measurements.names()``, each in a process of its own, and each row is written as soon
as it is there. What the results hold of the same commit is not measured again; nothing starts that the budget has no
time for, and what it ends is gone on with next time. On a GPU that computes nothing (``benchmarks/fake_gpu``) all of it
runs without correctness checks, into a file elsewhere, which no report accepts.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.fake_gpu import launch as fake_gpu
from diversevit_fast.files import write_atomically

from . import measurements

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
SLACK_SECONDS = 20.0
"""A measurement starts only if the budget has at least this left."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--only", default="", help="measurements whose name holds this")
    parser.add_argument("--list", action="store_true", help="only print the names")
    options = parser.parse_args(arguments)
    names = [name for name in measurements.names() if options.only in name]
    if options.list:
        print("\n".join(names))
        return 0
    if reason := refusal(options.results):
        print(reason, file=sys.stderr)
        return 1
    end = time.monotonic() + 60 * options.minutes
    results = read(options.results)
    commit = measurements.commit()
    for name in names:
        known = results.get(name, {})
        if known.get("commit") != commit:
            known = {}
        if known.get("done"):
            continue
        left = end - time.monotonic()
        if left < SLACK_SECONDS:
            print(f"the budget is spent before: {name}")
            return 3

        def keep(result: dict[str, Any], name: str = name) -> None:
            results[name] = {"commit": commit, **result}
            write(options.results, results)

        found = measure(name, known, left, keep)
        keep(found)
        state = next(one for one in ("done", "stopped", "failed") if one in found)
        print(f"{name}: {state}, {len(found['rows'])} rows, {found['seconds']} s", flush=True)
    return 0


def refusal(results: Path) -> str | None:
    """Return why nothing can be measured here, or not for this file; None if it can."""
    if fake_gpu.here():
        if results.resolve().is_relative_to(RESULTS):
            return f"--results: expected a file outside {RESULTS}; a fake GPU has no results"
        return None
    return None if torch.cuda.is_available() else "measure_gpu: needs a GPU; there is none here"


def measure(
    name: str, known: dict[str, Any], seconds: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Carry out what is left of one measurement; give what is known of it to ``keep`` after every row.

    Returns:
        Its machine and rows, and ``done``, ``stopped`` for want of time, or ``failed`` with the end of what its
        process said.
    """
    result: dict[str, Any] = {"rows": list(known.get("rows", []))}
    begun = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command(name),
            **{"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said},
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, _end, [process])
        timer.start()
        with process.stdin as given:
            given.write(json.dumps(result["rows"]))
        last = ""
        for line in process.stdout:
            last, _, told = line.rstrip().partition(" ")
            if last == "MACHINE":
                result["machine"] = json.loads(told)
            elif last == "ROW":
                result["rows"].append(json.loads(told))
                keep(result)
        timer.cancel()
        status = process.wait()
        said.seek(0)
        if last == "DONE" and not status:
            result["done"] = True
        elif time.monotonic() - begun >= seconds:
            result["stopped"] = f"after {seconds:.0f} s, when the budget was spent"
        else:
            result["failed"] = said.read()[-1500:]
    taken = round(time.monotonic() - begun + known.get("seconds", 0.0), 1)
    return {**result, "seconds": taken}


def command(name: str) -> list[str]:
    program = ["-m", "tools.measure_gpu.measurements", name]
    return fake_gpu.command(program) if fake_gpu.here() else [sys.executable, *program]


def _end(process: subprocess.Popen[str]) -> None:
    """End a measurement with the tests that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


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
