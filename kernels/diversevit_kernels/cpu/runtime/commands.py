"""Running a compiler: it may take its time, but not for ever, and leaves nothing running behind."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

LIMIT = 180.0
"""Seconds that a compiler may take; the kernels here take it seconds."""

_hung: list[
    str
] = []  # said of every later command: a compiler that hung once is not waited for again


def compiler() -> list[str]:
    """The C++ compiler's command: ``CXX``, which may be several words (``ccache g++``), else ``c++``.

    Raises:
        OSError: the words of ``CXX`` cannot be told apart.
    """
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise OSError(f"CXX={os.environ['CXX']!r}: {error}") from None


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Run ``command`` to its end.

    Raises:
        OSError: it cannot be started, fails (with a line of what it said), or takes longer than ``LIMIT``.
    """
    if _hung:
        raise OSError(_hung[0])
    with (
        tempfile.TemporaryFile() as said
    ):  # no pipe: a server that a compiler starts would keep it open
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            _hung.append(f"{command[0]} did not end within {LIMIT:g} seconds")
            raise OSError(_hung[0]) from None
        finally:
            _end(process)
        if code:
            said.seek(0)
            raise OSError(_reason(said.read().decode(errors="replace"), code))


def _end(process: subprocess.Popen) -> None:
    """End what still runs of a command: a compiler's parts outlive it."""
    if process.poll() is not None:
        return
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(said: str, code: int) -> str:
    lines = said.strip().splitlines() or [f"exit code {code}, without a word"]
    return next((line for line in lines if "error" in line.lower()), lines[-1]).strip()
