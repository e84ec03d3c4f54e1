"""Train several of a run's trainings at a time, each in a process of its own.

On a CPU two trainings on one thread each take less time than one after the other on two. Trainings, checkpoints and
bits are those of one process with as many threads.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import usage_error
from .checkpoint import Task
from .config import Settings
from .metrics import Row
from .progress import EVERY


def number_of_workers(settings: Settings, trainings: int, on_cpu: bool) -> int:
    """Return how many workers train; 1: the process itself does."""
    if settings.workers is not None:
        return min(settings.workers, trainings)
    if not on_cpu:
        return 1
    return max(1, min(trainings, cores() // (settings.threads or 1)))


def cores() -> int:
    """Return how many processor cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def train_apart(folder: Path, tasks: Sequence[Task], workers: int, watcher: Any) -> None:
    """Train ``tasks`` in ``workers`` processes, up to their last checkpoint and their saved weights.

    Raises:
        UsageError: of a training; the others are stopped, each with the checkpoint of its last epoch.
    """
    waiting, lock, failures = list(tasks), threading.Lock(), []
    processes = [_Worker(folder) for _ in range(workers)]

    def serve(worker: "_Worker") -> None:
        try:
            while True:
                with lock:
                    if failures or not waiting:
                        return
                    task = waiting.pop(0)
                for name, arguments in worker.trained(task):
                    with lock:
                        getattr(watcher, name)(*arguments)
        except Exception as failure:
            with lock:
                failures.append(failure)

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in processes]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failures:
            time.sleep(0.05)
    finally:
        for worker in processes:
            worker.stop()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class _Worker:
    """The run's end of a worker process."""

    def __init__(self, folder: Path):
        self._process: Any = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run, which ends its workers
        )

    def trained(self, task: Task) -> Any:
        """Have it train ``task``; yield the calls for a ``train.Watcher`` until that is done."""
        try:
            self._process.stdin.write(f"{task}\n".encode())
            self._process.stdin.flush()
            while (said := pickle.load(self._process.stdout)) is not None:
                if isinstance(said, Exception):
                    raise said
                yield said
        except (EOFError, OSError, pickle.UnpicklingError):
            status = self._process.wait()
            hint = "see what it printed; free memory if the system ended it, or use --workers 1"
            got = f"its process ended with status {status}"
            raise usage_error("workers", f"{task} to be trained", got, hint) from None

    def stop(self) -> None:
        """End it, whatever it does: a checkpoint is written whole or not at all."""
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()


class Relay:
    """A ``train.Watcher`` that passes on what it is told; of steps as often as the display shows them."""

    def __init__(self, say: Any):
        self._say = say
        self._steps, self._said = 0, 0.0

    def noted(self, line: str) -> None:
        self._say(("noted", (line,)))

    def started(self, task: Task, epoch: int, epochs: int, steps: int) -> None:
        self._steps = 0
        self._say(("started", (task, epoch, epochs, steps)))

    def stepped(self, task: Task, loss: float, penalty: float | None, steps: int = 1) -> None:
        self._steps += steps
        if (now := time.perf_counter()) - self._said >= EVERY:
            self._say(("stepped", (task, loss, penalty, self._steps)))
            self._steps, self._said = 0, now

    def epoch_done(self, task: Task, epoch: int, rows: list[Row]) -> None:
        self._say(("epoch_done", (task, epoch, rows)))
