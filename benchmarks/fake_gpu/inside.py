"""Runs a program in a process whose CUDA driver is the fake one: ``SCRIPT``, ``-m MODULE`` or ``-c CODE``, arguments.

cuDNN is switched off: it brings its own copy of the runtime, which finds no device. The process ends without its
libraries' clean-up, which would ask the real runtime.
"""

import os
import runpy
import sys
import traceback

import torch


def main(program: list[str]) -> None:
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    status = 0
    try:
        _run(program)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(program: list[str]) -> None:
    first, *rest = program
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<code>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
