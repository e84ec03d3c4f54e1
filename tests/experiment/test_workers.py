"""Trainings in processes of their own: the same numbers, and every way in which one can end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import metrics, resolve, resume, run, workers
from diversevit_fast.experiment.metrics import TIMING
from diversevit_fast.experiment.run import Interrupted
from tests.experiment.test_experiment import quiet

pytest.importorskip("rich")
pytest.importorskip("sklearn")
TINY = json.loads(Path(__file__).with_name("tiny_run.json").read_text())
LONG = {**TINY, "samples": 400, "epochs": 500, "seeds": (0,)}


def settings(**changes):
    return resolve({**TINY, "seeds": (0, 1), **changes})


def numbers(folder: Path) -> list[dict]:
    rows = metrics.read_csv(folder / "metrics.csv")
    return [{name: x for name, x in row.items() if name not in TIMING} for row in rows]


@pytest.fixture
def processes(monkeypatch) -> list:
    """The worker processes that were started."""
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if f"{workers.__package__}.worker" in self.args:  # git is asked for the commit too
                started.append(self)

    monkeypatch.setattr(workers.subprocess, "Popen", Popen)
    return started


class Watching:
    """A console that calls ``act`` once a line holds ``word``."""

    is_terminal = False
    file = _file = None

    def __init__(self, word: str, act):
        self.word, self.act = word, act

    def print(self, line="", **_):
        if self.act is not None and self.word in str(line):
            act, self.act = self.act, None
            act()


def test_numbers_and_weights_are_those_of_one_process(tmp_path, processes):
    alone = run(settings(), tmp_path / "alone", console=quiet())
    assert not processes
    apart = run(settings(workers=2), tmp_path / "apart", console=quiet())
    assert len(processes) == 2
    assert numbers(apart) == numbers(alone)
    for file in alone.glob("*.safetensors"):
        assert len((apart / file.name).read_bytes()) == len(file.read_bytes())
    assert (apart / "cosines.json").read_text() == (alone / "cosines.json").read_text()
    assert all(process.poll() is not None for process in processes)


def test_an_error_of_a_training_ends_the_run_in_a_line(tmp_path, processes):
    with pytest.raises(UsageError, match="loss: expected a finite number, got NaN or infinity"):
        run(settings(workers=2, lr=1e30, epochs=50), tmp_path / "out", console=quiet())
    assert all(process.poll() is not None for process in processes)
    assert (tmp_path / "out.partial/config.json").exists()


def test_a_worker_that_is_killed_ends_the_run_in_a_line_and_can_be_resumed(tmp_path, processes):
    whole = run(settings(), tmp_path / "whole", console=quiet())
    console = Watching("epoch 1/", lambda: processes[0].kill())
    with pytest.raises(UsageError, match=r"ended with status -9.*--workers 1"):
        run(settings(workers=2), tmp_path / "out", console=console)
    assert all(process.poll() is not None for process in processes)
    assert numbers(resume(tmp_path / "out", console=quiet())) == numbers(whole)


def test_an_interrupt_ends_the_workers(tmp_path, processes):
    console = Watching(", epoch", lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background ignores it
    try:
        with pytest.raises(Interrupted, match="diversevit run --resume"):
            run(resolve({**LONG, "workers": 2}), tmp_path / "out", console=console)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from diversevit_fast.experiment import resolve, run\n"
        f"run(resolve({ {**LONG, 'workers': 2}!r}), Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "epoch" not in process.stdout.readline():
            assert process.poll() is None
        folder = str(tmp_path / "out.partial")
        assert len(ours(folder)) == 2
        process.kill()
    for _ in range(600):
        if not ours(folder):
            return
        time.sleep(0.1)
    pytest.fail("they still run")


def ours(folder: str) -> list[str]:
    """The worker processes of the run in ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if folder in words and "diversevit_fast.experiment.worker" in words:
            found.append(path.parent.name)
    return found


@pytest.mark.parametrize(
    ("changes", "cores", "trainings", "on_cpu", "wanted"),
    [
        ({"workers": None}, 8, 4, True, 4),
        ({"workers": None}, 2, 4, True, 2),
        ({"workers": None}, 2, 1, True, 1),
        ({"workers": None, "threads": 2}, 2, 4, True, 1),
        ({"workers": None, "threads": 4}, 2, 4, True, 1),
        ({"workers": None}, 8, 4, False, 1),
        ({"workers": 3}, 1, 10, False, 3),
        ({"workers": 3}, 1, 2, True, 2),
    ],
)
def test_how_many(changes, cores, trainings, on_cpu, wanted, monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: cores)
    chosen = settings(**{"threads": None, **changes})
    assert workers.number_of_workers(chosen, trainings, on_cpu) == wanted
