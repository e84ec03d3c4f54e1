"""Runs a program on the fake GPU: ``python -m benchmarks.fake_gpu [--copies] [--launch-ns=N] SCRIPT|-m|-c ...``.

The exit status is the program's, or 77 where the driver cannot be built: a test is skipped then.
"""

import sys

from .build import UNAVAILABLE, UnavailableError
from .launch import run


def main(arguments: list[str]) -> int:
    copies, launch_ns = False, 0
    while arguments and arguments[0].startswith("--"):
        option, _, value = arguments.pop(0).partition("=")
        if option == "--copies":
            copies = True
        elif option == "--launch-ns" and value.isdecimal():
            launch_ns = int(value)
        else:
            print(__doc__, file=sys.stderr)
            return 2
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        return run(arguments, copies, launch_ns)
    except UnavailableError as reason:
        print(reason, file=sys.stderr)
        return UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
