"""Code run on a GPU that computes nothing: ``benchmarks/fake_gpu`` in a process of its own.

``torch.cuda`` sees one H200, Triton compiles and launches, autograd's device thread runs, graphs are captured and
replayed; what a capture forbids fails. Kernels write nothing, so compare no results.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
UNAVAILABLE = 77
"""The exit status where the driver cannot be built."""


def run_on_fake_gpu(
    code: str, *, copies: bool = False, timeout: float = 900, **variables: str
) -> str:
    """Return what ``code`` prints; skip the test where the fake GPU cannot be built.

    In the code, ``from benchmarks.fake_gpu.counters import counting`` counts launches, waits and so on.

    Args:
        copies: copies and memsets move bytes, so that what was copied to the device can be read back.
        variables: of the environment.

    Raises:
        AssertionError: the code failed; the message holds its errors.
    """
    options = ["--copies"] if copies else []
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.fake_gpu", *options, "-c", code],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if run.returncode == UNAVAILABLE:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    return run.stdout


def json_from_fake_gpu(code: str, **options: Any) -> Any:
    """Return the JSON on the last line that ``code`` prints."""
    return json.loads(run_on_fake_gpu(code, **options).splitlines()[-1])
