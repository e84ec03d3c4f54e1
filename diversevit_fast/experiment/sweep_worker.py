"""A process that works for a sweep: ``python -m diversevit_fast.experiment.sweep_worker FOLDER SHARD OF MINUTES``.

It says a line about each cell on its standard output, and ends with the sweep, which holds its standard input.
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from ..errors import UnsupportedError, UsageError
from ..files import FileError
from .run import Interrupted
from .sweep_folder import SweepFolder
from .sweep_work import work


def main(arguments: list[str]) -> int:
    """Work as the process of a sweep; return its exit code. What it says goes to standard output, line by line."""
    folder, shard, of, minutes = arguments
    out, sys.stdout = sys.stdout, sys.stderr

    def say(line: str) -> None:
        with contextlib.suppress(OSError):
            print(line, file=out, flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    try:
        sweep = SweepFolder.open(Path(folder), float(minutes))
        work(sweep, say, shard=(int(shard), int(of)))
    except FileError as failure:
        say(f"error: {failure}, then continue with: diversevit sweep --resume {folder}")
        return 2
    except (UsageError, UnsupportedError) as failure:
        say(f"error: {failure}")
        return 2
    except (Interrupted, KeyboardInterrupt):
        return 130
    return 0


def _end_with_the_sweep() -> None:
    """Wait until the sweep is gone, then end this process as Ctrl-C does."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):  # not sys.stdin, whose lock would be missed at the end
            pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
