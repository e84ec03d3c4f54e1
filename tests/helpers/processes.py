"""Code run in a Python of its own, where nothing has been compiled or warned about yet."""

import os
import subprocess
import sys


def in_a_process(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
