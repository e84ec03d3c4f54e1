"""A run struck at every one of its calls to the file system: by an error, Ctrl-C, or its death.

Afterwards it is resumed, and must end as an undisturbed run does, bit for bit, having lost at most the
epoch it was in. All in this process: a death is an exception that nothing survives, after which every
further call to the file system fails, so that no tidying up happens.
"""

import errno
import fcntl
import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from diversevit_fast.data import load_splits
from diversevit_fast.experiment import plots
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.progress import Progress
from diversevit_fast.experiment.run_folder import Place
from tests.experiment.test_experiment import contents
from tests.helpers.interrupts import interrupted_after_an_epoch

pytest.importorskip("typer")
EPOCHS = 2
CONFIG = Path(__file__).with_name("tiny_run.json")
CALLS = [  # everything that a run does to files goes through one of these
    *((os, name) for name in ("open", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")),
    *((io, "open"), (fcntl, "flock"), (torch, "save")),
]


class Death(BaseException):
    """The process ends here."""


class Striker:
    """Counts the calls, and strikes at the ``at``-th: then ``what`` happens instead."""

    def __init__(self, root: Path, at: int, what: str):
        self.root, self.at, self.what = str(root), at, what
        self.calls, self.struck = 0, ""

    def __call__(self, name: str, arguments: tuple, options: dict) -> None:
        ours = any(self.root in os.fspath(a) for a in arguments if isinstance(a, (str, Path)))
        if not (ours or name in ("fsync", "flock", "save") or "dir_fd" in options):
            return
        self.calls += 1
        if self.calls == self.at or (self.struck and self.what == "death"):
            self.struck = self.struck or name
            match self.what:
                case "error":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                case "interrupt":
                    raise KeyboardInterrupt
                case "death":
                    raise Death

    @contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in CALLS:
                patch.setattr(module, name, self._around(name, getattr(module, name)))
            yield

    def _around(self, name, call):
        def around(*arguments, **options):
            self(name, arguments, options)
            return call(*arguments, **options)

        return around


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The data are made once, and pictures are a few bytes: they are files like any other."""
    splits = load_splits("digits-photos", samples=8)
    runs = sys.modules["diversevit_fast.experiment.run"]  # the package's ``run`` is its function
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_splits", lambda *_, **__: splits)
        patch.setattr(runs, "rehearse", lambda: None)
        for name in ("_curves", "_heads", "_cosines"):
            patch.setattr(plots, name, lambda *_: None)
        patch.setattr(plots, "_png", lambda _: b"a picture")
        yield


@pytest.fixture
def epochs(monkeypatch) -> list[int]:
    """The epochs that are trained, by number."""
    trained: list[int] = []
    done = Progress.epoch_done

    def epoch_done(self, task, epoch, rows):
        trained.append(epoch)
        done(self, task, epoch, rows)

    monkeypatch.setattr(Progress, "epoch_done", epoch_done)
    return trained


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def start(root: Path) -> int:
    return call("train", "diversevit", "--config", CONFIG, "--out", root / "out")


def finish(root: Path) -> None:
    """What a user does after any end: resume what there is, else start."""
    place = Place(root / "out")
    if place.partial.exists():
        assert call("run", "--resume", place.partial) == 0
    elif not place.finished:
        assert not place.out.exists()
        assert start(root) == 0
    elif call("run", "--resume", place.out) != 0:  # nothing is left to do, not even to tidy
        assert not (place.out / ".lock").exists()


@pytest.fixture(scope="module")
def undisturbed(quick, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    assert start(root) == 0
    return root / "out"


@pytest.fixture(scope="module")
def stopped(quick, tmp_path_factory) -> Path:
    """A run that ended after its first epoch."""
    root = tmp_path_factory.mktemp("stopped")
    with interrupted_after_an_epoch():
        assert start(root) == 130
    return root / "out.partial"


def strike(root: Path, at: int, what: str, work, capsys) -> bool:
    """Whether there was an ``at``-th call; it was struck, and what was said is as it must be."""
    striker, before = Striker(root, at, what), set(root.rglob(".*.tmp"))
    capsys.readouterr()
    with striker.watching():
        if what == "death":
            try:
                work()
            except Death:
                return True
            return bool(striker.struck)
        code = work()
    said = capsys.readouterr().err
    if not striker.struck:
        return False
    wanted = {"error": (2, "error: "), "interrupt": (130, "")}[what]
    if code != 0:  # else it did not matter: tidying up
        assert code == wanted[0], (striker.struck, said)
        assert said.startswith(wanted[1])
        assert said.count("\n") == 1, said
        assert "Traceback" not in said
    if striker.struck != "unlink":
        assert set(root.rglob(".*.tmp")) <= before
    return True


def check(root: Path, undisturbed: Path) -> None:
    out = root / "out"
    assert contents(out) == contents(undisturbed)
    assert {p.name for p in out.iterdir()} == {p.name for p in undisturbed.iterdir()}
    assert not (root / "out.partial").exists()


WAYS = ["error", "interrupt", "death"]


@pytest.mark.parametrize("what", WAYS)
def test_a_run_struck_anywhere(what, undisturbed, epochs, tmp_path, capsys):
    struck = 0
    for at in range(1, 1000):
        root = tmp_path / str(at)
        root.mkdir()
        epochs.clear()
        if not strike(root, at, what, lambda: start(root), capsys):  # noqa: B023
            break
        struck += 1
        finish(root)
        check(root, undisturbed)
        assert len(epochs) <= EPOCHS + 1, "more is lost than the current epoch"
        if what != "death":
            assert not [p for p in root.iterdir() if p.name.startswith(".")]
    assert struck > 50


@pytest.mark.parametrize("what", WAYS)
@pytest.mark.parametrize(
    "ranks",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["one process", "as ranks left it"],
)
def test_a_resumed_run_struck_anywhere(what, ranks, stopped, undisturbed, epochs, tmp_path, capsys):
    struck = 0
    for at in range(1, 1000):
        root = tmp_path / str(at)
        shutil.copytree(stopped, root / "out.partial")
        if ranks:  # then the checkpoints are folders; none is there yet
            (checkpoint,) = (root / "out.partial/checkpoints").glob("*.pt")
            checkpoint.unlink()
            checkpoint.with_suffix("").mkdir()
        epochs.clear()
        resume = ("run", "--resume", root / "out")
        if not strike(root, at, what, lambda: call(*resume), capsys):  # noqa: B023
            break
        struck += 1
        finish(root)
        check(root, undisturbed)
        assert len(epochs) <= EPOCHS + ranks, "more is lost than the current epoch"
    assert struck > 30


@pytest.mark.parametrize("what", WAYS)
def test_a_whole_run_without_a_name_is_never_trained(what, undisturbed, epochs, tmp_path, capsys):
    """As an older version left it: complete, its checkpoints removed or half removed."""
    for at in range(1, 100):
        root = tmp_path / str(at)
        shutil.copytree(undisturbed, root / "out.partial")
        for checkpoint in (root / "out.partial/checkpoints").iterdir():
            checkpoint.unlink()
        (root / "out.partial/.0123456789abcdef.tmp").write_text("half")
        resume = ("run", "--resume", root / "out")
        if not strike(root, at, what, lambda: call(*resume), capsys):  # noqa: B023
            break
        finish(root)
        check(root, undisturbed)
    assert at > 3
    assert not epochs
