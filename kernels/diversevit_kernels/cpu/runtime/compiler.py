"""Run the C++ compiler, or a Python that compiles, with a time limit and without leaving processes behind."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

TIMEOUT = 180.0
"""Seconds after which a compiler is killed; these kernels take it a few."""

# The error of every later command: once one was killed, the next would only cost the same time again.
_timed_out: list[str] = []


def command() -> list[str]:
    """Return the C++ compiler's command: ``CXX``, which may be several words (``ccache g++``), else ``c++``.

    Raises:
        OSError: ``CXX`` cannot be split into words.
    """
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise OSError(f"CXX={os.environ['CXX']!r}: {error}") from None


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Run ``command`` to its end.

    Raises:
        OSError: it cannot be started, fails (with a line of its output), or takes longer than ``TIMEOUT``.
    """
    if _timed_out:
        raise OSError(_timed_out[0])
    with (
        tempfile.TemporaryFile() as errors
    ):  # not a pipe: servers that compilers start keep it open
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            _timed_out.append(f"{command[0]} did not end within {TIMEOUT:g} seconds")
            raise OSError(_timed_out[0]) from None
        finally:
            _kill(process)
        if code:
            errors.seek(0)
            raise OSError(_reason(errors.read().decode(errors="replace"), code))


def _kill(process: subprocess.Popen) -> None:
    """Kill the process, if it still runs, with its whole session: a compiler's parts would outlive it."""
    if process.poll() is not None:
        return
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(output: str, code: int) -> str:
    """Return the first line that mentions an error, else the last line."""
    lines = output.strip().splitlines() or [f"exit code {code}, without a word"]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()
