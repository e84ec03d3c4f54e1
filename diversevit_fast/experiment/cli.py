"""The console script ``diversevit``: run a command and report every expected failure in one line.

Typer is an optional dependency, imported when the command line is used: by ``main``, or by asking
this module for ``app``.
"""

import errno
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedError, UsageError, require
from .terminal import steady_streams

_RUNS = ("run", "train")
_LONGEST = 4000  # characters of an error: two long paths, but not a whole file given as an option
_CONTROL = dict.fromkeys(
    (*range(32), *range(127, 160)), " "
)  # a file's name must not steer a terminal


def main(args: Sequence[str] | None = None) -> None:
    """Run ``diversevit`` with ``args`` (the process's own if None) and exit.

    Exit codes: 0 done; 1 ``doctor`` found a fault, or trainings of a sweep failed; 2 a mistake the
    caller can mend, said on standard error as ``error: ...``; 130 interrupted. A reader of the output
    who leaves early (``| head -1``) changes none of it.
    """
    with steady_streams():
        code = _check_output(_run(args), sys.argv[1:] if args is None else args)
    sys.exit(code)


def _run(args: Sequence[str] | None) -> int:
    """Run a command, print what went wrong if it failed, and return its exit code."""
    try:
        app = __getattr__("app")
        code = app(args=args, prog_name="diversevit", standalone_mode=False)
    except (UsageError, UnsupportedError, OSError) as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except Exception as error:
        say = getattr(error, "format_message", None)  # what typer raises for a wrong command line
        if say is None and _out_of_memory(error):
            return _fail(
                "memory: expected enough for this, got too little; free some, then try again"
            )
        if say is None:
            raise
        code = _fail(f"{say()} (see diversevit --help)") if say() else 2  # 2: help was shown
    return code if isinstance(code, int) else 0


def _check_output(code: int, args: Sequence[str]) -> int:
    """Return ``code``, or 2 if the output was lost on a full disk (a closed pipe is no failure).

    What a run says is not what it makes, so it has not failed.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if code or not isinstance(lost, OSError) or lost.errno == errno.EPIPE:
        return code
    failed = _fail(
        f"standard output: expected a place that can be written, got {lost.strerror}; mend that first"
    )
    return 0 if args[:1] and args[0] in _RUNS else failed


def _out_of_memory(error: Exception) -> bool:
    from .run_files import out_of_memory

    return out_of_memory(error)


def _fail(message: str, code: int = 2) -> int:
    line = " ".join(message.translate(_CONTROL).split())
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]} ..."
    print(f"error: {line}", file=sys.stderr)
    return code


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("typer", extra="train")
    from .commands import app

    return app


if __name__ == "__main__":
    main()
