"""Messages that stop nothing: any encoding, closed pipes, full disks; and a console of the caller's."""

import errno
import io
import os
import sys
from contextlib import suppress

import pytest

from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.terminal import Steady, steady, steady_console, steady_streams

SAID = "0.7 ± 0.1 → DiverseViT’s “é” · 你 x\udcff"


def stream(encoding: str) -> tuple[io.BytesIO, io.TextIOWrapper]:
    raw = io.BytesIO()
    return raw, io.TextIOWrapper(raw, encoding=encoding, write_through=True)


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [
        ("ascii", b'0.7 +- 0.1 -> DiverseViT\'s "e" ? ? x\xff'),
        ("latin-1", b'0.7 \xb1 0.1 -> DiverseViT\'s "\xe9" \xb7 ? x\xff'),
        ("utf-8", SAID[:-1].encode() + b"\xff"),
        ("cp1252", b"0.7 \xb1 0.1 -> DiverseViT\x92s \x93\xe9\x94 \xb7 ? x\xff"),
    ],
)
def test_characters_degrade(encoding, wanted):
    raw, text = stream(encoding)
    Steady(text).write("first ")
    Steady(text).write(SAID)
    Steady(text).write(" last")
    assert raw.getvalue() == b"first " + wanted + b" last"


def test_a_stream_without_bytes_beneath_it():
    text = io.StringIO()
    Steady(text).write(SAID)
    assert text.getvalue() == SAID


class Broken(io.StringIO):
    def __init__(self, failure: Exception):
        super().__init__()
        self.failure, self.calls = failure, 0

    def write(self, text: str) -> int:
        self.calls += 1
        raise self.failure


@pytest.mark.parametrize(
    "failure",
    [
        BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("I/O operation on closed file"),
    ],
    ids=["pipe", "disk", "closed"],
)
def test_after_an_error_a_stream_is_quiet(failure):
    broken = Broken(failure)
    quiet = Steady(broken)
    assert quiet.write("a") == 1
    quiet.writelines(["b", "c"])
    quiet.flush()
    assert quiet.lost is failure
    assert broken.calls == 1


def test_what_else_a_stream_has_is_its_own():
    _, text = stream("ascii")
    assert Steady(text).encoding == "ascii"
    assert not Steady(text).isatty()
    assert steady(None) is None
    assert steady(quiet := Steady(text)) is quiet


def test_standard_streams_are_the_callers_again(capsys):
    before = sys.stdout, sys.stderr
    with suppress(KeyError), steady_streams():
        assert isinstance(sys.stdout, Steady)
        print("said")
        raise KeyError
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "said\n"


def test_a_closed_pipe_changes_no_exit_code(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as left:
            main(["--help"])
        pipe.flush()  # as the interpreter does at its end
    assert left.value.code == 0


@pytest.mark.parametrize(("command", "code"), [("--help", 2), ("run", 0)])
def test_an_answer_that_is_lost_is_said(command, code, monkeypatch, capsys):
    """A run's messages are not what it makes."""
    monkeypatch.setattr(sys, "stdout", Broken(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == code
    said = (
        "error: standard output: expected a place that can be written, got No space left on device"
    )
    assert capsys.readouterr().err == f"{said}; mend that first\n"


def test_a_console_of_the_callers():
    console = pytest.importorskip("rich.console").Console(
        file=Broken(BrokenPipeError(errno.EPIPE, "gone"))
    )
    file = console.file
    with steady_console(console):
        console.print("± said")
    assert console.file is file


def test_a_live_bar_on_a_closed_pipe():
    """Its thread writes on its own."""
    rich = pytest.importorskip("rich.console")
    progress = pytest.importorskip("rich.progress").Progress
    console = rich.Console(file=Broken(BrokenPipeError()), force_terminal=True)
    with steady_console(console), progress(console=console, refresh_per_second=100) as bar:
        task = bar.add_task("±", total=3)
        for _ in range(3):
            bar.advance(task)
            bar.refresh()
