"""What a run says of its progress: the time left of the whole run, and all trainings in one display."""

import io
import re

import pytest

from diversevit_fast.experiment import progress as module
from diversevit_fast.experiment.checkpoint import Task
from diversevit_fast.experiment.progress import Progress

console = pytest.importorskip("rich.console").Console
ONE, TWO = Task("erm", 0), Task("diversevit", 0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved; in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def rows():
    parts = [(split, heads) for split in ("val_id", "val_ood") for heads in ("all", 0)]
    evaluated = [{"split": split, "heads": heads, "accuracy": 0.5} for split, heads in parts]
    return [{"steps_per_second": 1.0, "loss": 0.7, "penalty": None}, *evaluated]


def said(of, **options):
    """Run ``of`` with a progress and return its lines and the texts of the bar's lines."""
    file = io.StringIO()
    with Progress(console(file=file, width=200, **options), trainings=3) as shown:
        of(shown)
        tasks = [] if shown._bar is None else shown._bar.tasks
        bar = [(t.description, t.completed, t.total, t.fields["left"]) for t in tasks]
    return file.getvalue().splitlines(), bar


def two_at_a_time(shown, clock):
    shown.started(ONE, 0, 4, 10)
    shown.started(TWO, 2, 4, 10)  # two of its epochs are of an earlier process
    clock[0] += 20
    shown.stepped(ONE, 0.7, None, 10)
    shown.epoch_done(ONE, 1, rows())
    clock[0] += 10
    shown.epoch_done(TWO, 3, rows())


def test_lines_end_with_the_time_left_of_the_run(clock):
    """Three trainings of four epochs: 9 are left after one in 20 s, 8 after two in 30 s."""
    lines, bar = said(lambda shown: two_at_a_time(shown, clock))
    assert not bar
    left = [found[1] for line in lines if (found := re.search(r", ([0-9:]+) left$", line))]
    assert left == ["0:03:00", "0:02:00"]
    assert lines[1] == "DiverseViT seed 0: continues after epoch 2"


def test_the_last_line_says_no_time(clock):
    def of(shown):
        for task in (ONE, TWO, Task("erm", 1)):
            shown.started(task, 0, 1, 10)
            clock[0] += 5
            shown.epoch_done(task, 1, rows())

    lines, _ = said(of)
    assert lines[3].endswith("0:00:05 left")
    assert lines[5].endswith("best head OOD 0.500")


def test_a_finished_training_is_said_and_counts(clock):
    def resumed(shown):
        shown.started(Task("erm", 1), 4, 4, 10)
        shown.started(ONE, 0, 4, 10)
        clock[0] += 20
        shown.epoch_done(ONE, 1, rows())

    lines, _ = said(resumed)
    assert lines[0] == "ERM seed 1: trained before"
    assert lines[-1].endswith("0:02:20 left")  # seven epochs of twelve


def test_one_display_of_all_trainings(clock):
    _, bar = said(lambda shown: two_at_a_time(shown, clock), force_terminal=True)
    assert bar == [
        ("ERM seed 0", 10, 40, "0:01:00 left"),
        ("DiverseViT seed 0", 20, 40, ""),
        ("whole run", 4, 12, "0:02:00 left"),
    ]


def test_no_line_of_the_bar_outlives_its_training(clock):
    def of(shown):
        shown.started(ONE, 4, 4, 10)
        shown.started(TWO, 3, 4, 10)
        clock[0] += 1
        shown.epoch_done(TWO, 4, rows())

    _, bar = said(of, force_terminal=True)
    assert [line[0] for line in bar] == ["whole run"]


def test_a_single_training_has_no_line_of_the_run(clock):
    file = io.StringIO()
    with Progress(console(file=file, force_terminal=True)) as shown:
        shown.started(ONE, 0, 4, 10)
        assert [t.description for t in shown._bar.tasks] == ["ERM seed 0"]
