"""A sweep: one training for every combination of settings and every seed, by any number of processes and machines.

Data flow: ``sweep_grid`` (cells) -> ``sweep_folder`` with ``sweep_claims`` (which cell is whose) -> ``sweep_work``
(``run`` or ``resume`` of a cell) -> ``sweep_results`` (``results.csv``) -> ``sweep_report`` (``sweep.html``).
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import FileError
from .machine import choose_device, commit, versions
from .models import backbone
from .run import Interrupted, check
from .sweep_claims import STALE_AFTER
from .sweep_folder import SweepFolder
from .sweep_grid import Grid
from .sweep_report import write_sweep_report
from .sweep_results import Results
from .sweep_work import Say, Shelf, data_key, work
from .workers import cores

_PATIENCE = 60.0  # seconds that a worker has to release its cell


@dataclass(frozen=True)
class Outcome:
    """How a sweep stands when a process has done what it could.

    Attributes:
        folder: of the sweep.
        done, running, left: numbers of cells: finished, trained by others, trained by nobody.
        missed: of those left, the ones that this process should have trained: its workers died over them.
        failed: reasons by cell.
    """

    folder: Path
    done: int
    running: int
    left: int
    missed: int
    failed: dict[str, str]


@dataclass(frozen=True)
class Hands:
    """Who works.

    Attributes:
        workers: processes on a CPU; None: as many as there are cores for their threads, and one on a GPU.
        gpus: indices or names for ``CUDA_VISIBLE_DEVICES``, one GPU for each worker; none: whatever is there.
        per_gpu: workers for each of ``gpus``.
        shard: ``(k, n)``: every n-th cell from the k-th on.
        stale_after: minutes after which a silent process counts as gone.
    """

    workers: int | None = None
    gpus: tuple[str, ...] = ()
    per_gpu: int = 1
    shard: tuple[int, int] = (1, 1)
    stale_after: float = STALE_AFTER

    def environments(self, cells: int, threads: int, on_cpu: bool) -> list[dict[str, str]]:
        """Return what each worker has in its environment."""
        if self.gpus:
            return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(self.per_gpu) for gpu in self.gpus]
        count = self.workers or (max(1, cores() // threads) if on_cpu else 1)
        return [{}] * max(1, min(count, cells))


def run_sweep(
    grid: Grid, out: str | Path, *, hands: Hands | None = None, say: Say = print
) -> Outcome:
    """Train every cell of ``grid`` in the folder ``out``; join in where the same sweep is already there.

    Args:
        hands: how many processes, on what.
        say: takes a line about each cell.

    Raises:
        UsageError: a setting cannot be run, the data are missing, or ``out`` holds something else. A cell that fails
            while it trains is no error: see ``Outcome.failed``.
        Interrupted: Ctrl-C; ``resume_sweep`` goes on.
    """
    hands = hands or Hands()
    grid = grid.with_files(os.path.abspath)  # the sweep may be resumed from elsewhere
    fixed = grid.fixed
    if fixed.threads is None:  # decided once: the number of threads decides how sums are rounded
        fixed = dataclasses.replace(fixed, threads=max(1, cores() // (hands.workers or cores())))
    grid = dataclasses.replace(grid, fixed=fixed)
    shelf, prints = Shelf({}), {}
    digests: dict[str, str] = {}
    for settings in grid.settings():
        prints[data_key(settings)] = check(settings, shelf.load)
        if settings.pretrained is not None:
            digests.setdefault(settings.pretrained, backbone(settings)["sha256"])
    more = {"splits": prints, "weights": digests, "versions": versions(), "commit": commit()}
    sweep = SweepFolder.create(out, grid, more, hands.stale_after)
    if sweep.progress().left:
        shelf.share(sweep.data)
    return _continue(sweep, hands, say)


def resume_sweep(
    folder: str | Path, *, hands: Hands | None = None, retry: bool = False, say: Say = print
) -> Outcome:
    """Train what is left of a sweep, beside other processes that do the same.

    Args:
        retry: also the cells that failed.

    Raises:
        UsageError: no sweep, one of another format, or other data than it began with.
        Interrupted: Ctrl-C.
    """
    hands = hands or Hands()
    sweep = SweepFolder.open(folder, hands.stale_after)
    if retry:
        sweep.forgive()
    return _continue(sweep, hands, say)


def _continue(sweep: SweepFolder, hands: Hands, say: Say) -> Outcome:
    results = Results(sweep)
    command = f"diversevit sweep --resume {sweep.path}"
    progress = sweep.progress()
    say(f"{len(sweep.cells)} cells, {len(progress.done)} done, in {sweep.path}")
    fixed = sweep.grid.fixed
    on_cpu = fixed.device == "cpu" or (not hands.gpus and choose_device(fixed.device).type == "cpu")
    environments = hands.environments(len(progress.left), fixed.threads or 1, on_cpu)
    try:
        if len(environments) == 1 and not environments[0]:
            work(sweep, say, shard=hands.shard, results=results)
        elif progress.left:
            _work_apart(sweep, hands, environments, say)
        rows = results.update()
        if rows:
            write_sweep_report(sweep, rows)
    except KeyboardInterrupt:
        raise Interrupted(sweep.path, command) from None
    except FileError as failure:
        raise FileError(f"{failure}, then continue with: {command}") from None
    progress = sweep.progress()
    if not progress.left and not progress.running:
        shutil.rmtree(sweep.data, ignore_errors=True)
    index, count = hands.shard
    return Outcome(
        sweep.path,
        done=len(progress.done),
        running=len(progress.running),
        left=len(progress.left),
        missed=len(set(progress.left) & set(list(sweep.cells)[index - 1 :: count])),
        failed=progress.failed,
    )


def _work_apart(
    sweep: SweepFolder, hands: Hands, environments: Sequence[Mapping[str, str]], say: Say
) -> None:
    """Let a process for each of ``environments`` work, and pass on what they say.

    Raises:
        UsageError: one ended with an error that is none of a cell's.
    """
    lock, errors = threading.Lock(), []
    arguments = [str(sweep.path), *map(str, hands.shard), str(hands.stale_after)]

    def listen(process: Any) -> None:
        for line in process.stdout:
            with lock:
                if line.startswith("error: "):
                    errors.append(line.removeprefix("error: ").strip())
                else:
                    say(line.rstrip())

    processes: list[Any] = []
    try:
        for environment in environments:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", f"{__package__}.sweep_worker", *arguments],
                    env={**os.environ, **environment},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl-C is for the sweep, which ends its workers
                )
            )
        listeners = [threading.Thread(target=listen, args=(p,), daemon=True) for p in processes]
        for listener in listeners:
            listener.start()
        for process in processes:
            process.wait()
        for listener in listeners:
            listener.join(_PATIENCE)
    finally:
        _end(processes)
    for process in processes:
        if process.returncode not in (0, 2):
            say(f"worker {process.pid} ended with status {process.returncode}")
    if errors:
        raise UsageError(errors[0])


def _end(processes: Sequence[Any]) -> None:
    """End processes that still work: each releases its cell."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()
