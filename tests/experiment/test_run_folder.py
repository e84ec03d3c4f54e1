"""A run's folder in a hostile place: damaged bytes, a second process, planted links, a full disk."""

import errno
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from diversevit_fast import files
from diversevit_fast.data import load_splits
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import plots, resolve, resume, run
from diversevit_fast.experiment import train as training
from diversevit_fast.experiment import trained_model as weights
from diversevit_fast.experiment.checkpoint import Task, write_content
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.progress import Progress
from diversevit_fast.experiment.run import Interrupted
from diversevit_fast.experiment.run_folder import Lock, write_record
from diversevit_fast.models import DiverseViT
from tests.experiment.test_experiment import contents, quiet, rich_console
from tests.helpers.interrupts import interrupted_after_an_epoch

pytest.importorskip("typer")
Console = rich_console.Console
CONFIG = Path(__file__).with_name("tiny_run.json")
SETTINGS = {"methods": ("erm",), "seeds": (0,)}
TASK = Task("erm", 0)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The data are made once, and pictures are a few bytes."""
    splits = load_splits("digits-photos", samples=8)
    runs = sys.modules["diversevit_fast.experiment.run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_splits", lambda *_, **__: splits)
        patch.setattr(runs, "rehearse", lambda: None)
        for name in ("_curves", "_heads", "_cosines"):
            patch.setattr(plots, name, lambda *_: None)
        patch.setattr(plots, "_png", lambda _: b"a picture")
        yield


def start(out: Path | None, **changes) -> Path:
    return run(resolve({**SETTINGS, **changes}, CONFIG), out, console=quiet())


def stop(out: Path, **changes) -> Path:
    """The folder of a run that ended after its first epoch."""
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        start(out, **changes)
    return out.with_name(f"{out.name}.partial")


def as_ranks_left_it(folder: Path) -> Path:
    """The run in ``folder``, with a checkpoint such as several ranks write; its folder."""
    (folder / f"checkpoints/{TASK}.pt").unlink()
    (folder / f"checkpoints/{TASK}").mkdir()
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        resume(folder, console=quiet())
    return folder / f"checkpoints/{TASK}/epoch-000001"


@pytest.fixture(scope="module")
def unbroken(quick, tmp_path_factory) -> Path:
    return start(tmp_path_factory.mktemp("unbroken") / "out")


@pytest.fixture(scope="module")
def original(quick, tmp_path_factory) -> Path:
    return stop(tmp_path_factory.mktemp("stopped") / "out")


@pytest.fixture
def stopped(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "out.partial")


@pytest.fixture(scope="module")
def original_of_ranks(original, tmp_path_factory) -> Path:
    folder = shutil.copytree(original, tmp_path_factory.mktemp("ranks") / "out.partial")
    as_ranks_left_it(folder)
    return folder


def refused(folder: Path) -> str:
    """The one line that ``resume`` says instead of going on."""
    with pytest.raises(UsageError) as failure:
        resume(folder, console=quiet())
    assert "\n" not in str(failure.value)
    return str(failure.value)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


class TestDamage:
    def test_any_byte_of_a_checkpoint(self, stopped):
        path = stopped / f"checkpoints/{TASK}.pt"
        whole = path.read_bytes()
        for at in (*range(0, len(whole), len(whole) // 40), *range(len(whole) - 75, len(whole), 9)):
            flip(path, at)
            said = refused(stopped)
            assert said.startswith("checkpoint: expected an intact one of this run in"), at
            assert f"{path}, got a damaged one" in said, at
            assert "delete it" in said
            path.write_bytes(whole)
        for cut in (1, 40, 72, len(whole) // 2, len(whole)):
            path.write_bytes(whole[:-cut])
            assert f"{path}, got a damaged one" in refused(stopped), cut
        path.write_bytes(whole + b"x")
        assert "damaged" in refused(stopped)

    def test_a_checkpoint_of_before_there_were_checksums(self, stopped, unbroken):
        path = stopped / f"checkpoints/{TASK}.pt"
        content = torch.load(path, weights_only=True)
        torch.save({**content, "format": 1}, path)
        whole = path.read_bytes()
        weight = content["model"]["head.weight"].numpy().tobytes()
        flip(path, whole.index(weight) + 5)  # the zip's own checksums notice it
        assert "damaged" in refused(stopped)
        path.write_bytes(whole)
        assert contents(resume(stopped, console=quiet())) == contents(unbroken)

    def test_any_file_of_a_checkpoint_of_ranks(self, original_of_ranks, tmp_path):
        folder = shutil.copytree(original_of_ranks, tmp_path / "out.partial")
        last = folder / f"checkpoints/{TASK}/epoch-000001"
        names = sorted(path.name for path in last.iterdir())
        assert names == [".metadata", "__0_0.distcp", "history.pt"]
        for path in map(last.joinpath, names):
            whole = path.read_bytes()
            for at in range(0, len(whole), len(whole) // 12):
                flip(path, at)
                assert re.search(
                    rf"{path}.*, got a damaged one.*delete it with its folder", refused(folder)
                ), at
                path.write_bytes(whole)
            path.unlink()
            assert re.search(rf"{path}.*, got nothing there", refused(folder))
            path.write_bytes(whole)
        assert resume(folder, console=quiet()) == tmp_path / "out"

    def test_ranks_checkpoint_without_checksums_is_said(
        self, original_of_ranks, unbroken, tmp_path
    ):
        folder = shutil.copytree(original_of_ranks, tmp_path / "out.partial")
        history = folder / f"checkpoints/{TASK}/epoch-000001/history.pt"
        content = torch.load(history, weights_only=True)
        del content["files"]
        torch.save({**content, "format": 1}, history)
        heard = io.StringIO()
        out = resume(folder, console=Console(file=heard))
        assert "of an older version, without checksums" in heard.getvalue()
        assert contents(out) == contents(unbroken)

    def test_any_byte_of_weights(self, unbroken, tmp_path):
        path = tmp_path / "weights.safetensors"
        whole = (unbroken / f"{TASK}.safetensors").read_bytes()
        for at in range(len(whole)):
            if at % 7 == 0 or at % 16 == 5:  # the header, then the numbers
                path.write_bytes(whole)
                flip(path, at)
                with pytest.raises(UsageError, match="expected an intact safetensors file"):
                    DiverseViT.load(path)
        path.write_bytes(whole)
        DiverseViT.load(path)

    def test_weights_are_read_by_others_and_others_are_read(self, unbroken, tmp_path):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        path = unbroken / f"{TASK}.safetensors"
        ours = DiverseViT.load(path).state_dict()
        theirs = load_file(path)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        del metadata["checksum"]
        save_file(theirs, tmp_path / "old.safetensors", metadata)
        assert DiverseViT.load(tmp_path / "old.safetensors").state_dict().keys() == ours.keys()

    def test_a_changed_configuration(self, stopped, unbroken):
        path = stopped / "config.json"
        text = path.read_text()
        path.write_text(text.replace('"seeds": [\n      0', '"seeds": [\n      1'))
        assert path.read_text() != text
        said = refused(stopped)
        assert said.startswith(
            f"resume: expected {path} as the run wrote it, got one that does not"
        )
        record = json.loads(text)
        del record["sha256"]  # as an older version wrote it
        path.write_text(json.dumps(record))
        assert contents(resume(stopped, console=quiet())) == contents(unbroken)

    @pytest.mark.parametrize(
        "change",
        [
            *({"threads": None}, {"threads": "x"}, {"threads": 0}, {"ranks": []}, {"ranks": 3}),
            *({"versions": 1}, {"machine": None}, {"settings": []}),
        ],
        ids=str,
    )
    def test_a_configuration_that_lacks_something(self, change, stopped):
        path = stopped / "config.json"
        record = {**json.loads(path.read_text()), **change}
        write_record(path, {k: v for k, v in record.items() if v is not None})
        said = refused(stopped)
        assert said.startswith("resume: expected the configuration of a run, got")
        assert next(iter(change)) in said


class TestUnreadable:
    """What could not be read is not damaged, and nobody is told to delete it."""

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE], ids=os.strerror)
    def test_a_checkpoint_that_the_system_refuses(self, code, stopped, monkeypatch):
        opened = os.open

        def refuse(path, *arguments, **options):
            if str(path).endswith(".pt"):
                raise OSError(code, os.strerror(code))
            return opened(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            said = refused(stopped)
        assert f"{TASK}.pt: expected a file that can be read, got {os.strerror(code)};" in said
        assert said.endswith(f"then continue with: diversevit run --resume {stopped}")
        assert "delete" not in said
        resume(stopped, console=quiet())

    @pytest.mark.parametrize("ranks", [False, True], ids=["one process", "as ranks left it"])
    def test_checkpoints_that_cannot_be_looked_at_are_there(
        self, ranks, stopped, original_of_ranks, monkeypatch
    ):
        """Else the training would begin again."""
        if ranks:
            shutil.rmtree(stopped)
            shutil.copytree(original_of_ranks, stopped)
        hidden = str(stopped / f"checkpoints/{TASK}")

        def refuse(call):
            def refusing(path=".", *arguments, **options):
                if os.fspath(path) in (hidden, f"{hidden}.pt"):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                return call(path, *arguments, **options)

            return refusing

        monkeypatch.setattr(training, "_train_epoch", None)
        with monkeypatch.context() as patch:
            if ranks:
                patch.setattr(os, "listdir", refuse(os.listdir))
            else:
                patch.setattr(os, "lstat", refuse(os.lstat))
            said = refused(stopped)
        assert "Permission denied; mend that first, then continue with: diversevit run" in said

    @pytest.mark.parametrize("name", ["out.partial", "out.partial/checkpoints"])
    def test_a_folder_that_cannot_be_written_is_said_before_an_epoch(
        self, name, stopped, monkeypatch
    ):
        opened = os.open

        def refuse(path, flags, *mode, **options):
            if flags & os.O_EXCL and Path(path).parent == stopped.parent / name:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return opened(path, flags, *mode, **options)

        monkeypatch.setattr(training, "_train_epoch", None)
        monkeypatch.setattr(os, "open", refuse)
        assert f"{name}: expected a place that can be written, got Read-only" in refused(stopped)

    @pytest.mark.parametrize(
        "failure",
        [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
        ids=["Python", "PyTorch"],
    )
    def test_a_checkpoint_too_large_for_memory(self, failure, stopped, monkeypatch):
        def fail(*_, **__):
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", fail)
            said = refused(stopped)
        assert "expected a file that can be read, got too little memory for it; free some" in said
        assert "delete" not in said
        resume(stopped, console=quiet())

    def test_memory_that_ends_while_training(self, stopped, unbroken, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", fail)
            assert refused(stopped).startswith("memory: expected enough for this run, got too litt")
        assert contents(resume(stopped, console=quiet())) == contents(unbroken)

    def test_a_pipe_is_not_waited_for(self, stopped):
        path = stopped / f"checkpoints/{TASK}.pt"
        path.unlink()
        os.mkfifo(path)
        assert "expected a file that can be read, got a device or a pipe" in refused(stopped)

    def test_nor_one_among_the_files_of_ranks(self, original_of_ranks, tmp_path):
        folder = shutil.copytree(original_of_ranks, tmp_path / "out.partial")
        last = folder / f"checkpoints/{TASK}/epoch-000001"
        for path in sorted(last.iterdir()):
            whole = path.read_bytes()
            path.unlink()
            os.mkfifo(path)
            assert f"{path}: expected a file that can be read, got a device or a" in refused(folder)
            path.unlink()
            path.write_bytes(whole)
        content = torch.load(last / "history.pt", weights_only=True)
        for listed in ([], None, {1: "x"}, "x"):
            write_content(last / "history.pt", {**content, "files": listed})
            assert "got one that does not fit" in refused(folder)

    @pytest.mark.parametrize("name", ["weights.safetensors", "data.npz", "metrics.csv"])
    def test_other_files(self, name, unbroken, tmp_path, monkeypatch, capsys):
        path = tmp_path / name
        shutil.copy(unbroken / f"{TASK}.safetensors", path)
        opened, io_opened = os.open, io.open

        def refuse(other, *arguments, **options):
            if str(other) == str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            call = io_opened if arguments and isinstance(arguments[0], str) else opened
            return call(other, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(io, "open", refuse)
        command = {
            "weights.safetensors": ["evaluate", str(path)],
            "data.npz": ["run", "--data", "mnist-cifar", "--source", str(path)],
            "metrics.csv": ["report", str(tmp_path)],
        }[name]
        if name == "data.npz":
            monkeypatch.setattr(
                sys.modules["diversevit_fast.experiment.run"], "load_splits", load_splits
            )
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert f"{path}: expected a file that can be read, got Permission denied" in said
        assert said.count("\n") == 1


class TestTwoProcesses:
    def test_a_second_resume_is_refused(self, stopped, unbroken):
        with Lock() as lock:
            lock.take(stopped)
            said = refused(stopped)
            assert re.fullmatch(
                rf"resume: expected a run that nobody works on, got {stopped}, on which process "
                rf"{os.getpid()} on \S+ is at work; wait for it",
                said,
            )
        assert contents(resume(stopped, console=quiet())) == contents(unbroken)

    def test_a_run_is_locked_from_its_first_moment(self, tmp_path, monkeypatch):
        began = Progress.started

        def started(self, *arguments):
            assert "nobody works on" in refused(tmp_path / "out")
            began(self, *arguments)

        monkeypatch.setattr(Progress, "started", started)
        assert start(tmp_path / "out") == tmp_path / "out"

    def test_the_lock_ends_with_the_process(self, stopped):
        code = (
            "import sys, time; from pathlib import Path\n"
            "from diversevit_fast.experiment.run_folder import Lock\n"
            "Lock().take(Path(sys.argv[1])); lock = Lock(); lock.take(Path(sys.argv[2]))\n"
            "print('held', flush=True); time.sleep(100)"
        )
        other = stopped.with_name("other")
        other.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", code, str(other), str(stopped)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            assert f"process {process.pid} on " in refused(stopped)
            process.send_signal(signal.SIGKILL)
        assert resume(stopped, console=quiet())

    def test_default_names_of_one_second_differ(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        runs = sys.modules["diversevit_fast.experiment.run"]

        class Clock:
            now = staticmethod(lambda: datetime(2000, 1, 1))

        monkeypatch.setattr(runs, "datetime", Clock)
        first = start(None)
        (
            tmp_path / "runs/digits-photos-20000101-000000-2.partial"
        ).mkdir()  # one that is still running
        second = start(None)
        name = "runs/digits-photos-20000101-000000"
        assert [str(first), str(second)] == [name, f"{name}-3"]

    def test_a_place_taken_meanwhile(self, tmp_path, monkeypatch):
        """Two processes were given one name: the second finds it when it makes its folder."""
        runs = sys.modules["diversevit_fast.experiment.run"]
        prepare = runs.prepare

        def slowly(*arguments):
            result = prepare(*arguments)
            (tmp_path / "out.partial").mkdir()
            (tmp_path / "out.partial/config.json").write_text("another's")
            return result

        monkeypatch.setattr(runs, "prepare", slowly)
        with pytest.raises(UsageError, match=r"out: expected a new folder, got .*out\.partial, wh"):
            start(tmp_path / "out")
        assert [p.name for p in tmp_path.rglob("*")] == ["out.partial", "config.json"]
        assert (tmp_path / "out.partial/config.json").read_text() == "another's"


class TestLinks:
    """Somebody who may write into the folder cannot make a run write elsewhere."""

    def test_a_temporary_name_cannot_be_guessed_and_is_new(self, tmp_path, monkeypatch):
        names = []
        opened = os.open

        def spy(path, flags, *mode, **options):
            if flags & os.O_CREAT:
                names.append((Path(path).name, bool(flags & os.O_EXCL and flags & os.O_NOFOLLOW)))
            return opened(path, flags, *mode, **options)

        monkeypatch.setattr(os, "open", spy)
        for _ in range(2):
            files.write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
        assert names[0][0] != names[1][0]
        assert all(new for _, new in names)
        monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 16)
        (tmp_path / "victim").write_text("mine")
        (tmp_path / f".{'0' * 16}.tmp").symlink_to(tmp_path / "victim")
        with pytest.raises(files.FileError, match="File exists"):
            files.write_atomically(tmp_path / "a", lambda file: file.write(b"y"))
        assert (tmp_path / "victim").read_text() == "mine"

    @pytest.mark.parametrize(
        "name", [".lock", "checkpoints", f"checkpoints/{TASK}.pt.tmp", f"checkpoints/{TASK}.pt"]
    )
    def test_a_planted_link(self, name, stopped, tmp_path):
        victim = tmp_path / "victim"
        if name == "checkpoints":
            shutil.move(stopped / name, victim)
        else:
            victim.write_bytes(b"mine")
            (stopped / name).unlink(missing_ok=True)
        (stopped / name).symlink_to(victim)
        before = victim.read_bytes() if victim.is_file() else sorted(victim.iterdir())
        if name.endswith(".tmp"):  # once the name that a checkpoint was written under
            resume(stopped, console=quiet())
        else:
            assert str(stopped / name) in refused(stopped)
        assert before == (victim.read_bytes() if victim.is_file() else sorted(victim.iterdir()))

    def test_a_lock_that_is_somebodys_file_too(self, stopped, tmp_path):
        (tmp_path / "victim").write_text("mine")
        (stopped / ".lock").unlink()
        (stopped / ".lock").hardlink_to(tmp_path / "victim")
        resume(stopped, console=quiet())
        assert (tmp_path / "victim").read_text() == "mine"

    def test_a_folder_of_events_elsewhere(self, tmp_path):
        pytest.importorskip("tensorboard")
        folder = stop(tmp_path / "out", tensorboard=True)
        shutil.rmtree(folder / "tensorboard")
        (tmp_path / "victim").mkdir()
        (folder / "tensorboard").symlink_to(tmp_path / "victim")
        heard = io.StringIO()
        resume(folder, console=Console(file=heard, width=500))
        assert "no more event files: " in heard.getvalue()
        assert not list((tmp_path / "victim").iterdir())


class TestFinish:
    @pytest.mark.parametrize("there", ["folder", "file"])
    def test_a_name_taken_meanwhile_loses_nothing(self, there, unbroken, tmp_path, monkeypatch):
        runs = sys.modules["diversevit_fast.experiment.run"]
        out, partial = tmp_path / "out", tmp_path / "out.partial"

        def plant(console, folder=out):
            (folder / "sub").mkdir(parents=True) if there == "folder" else folder.write_text("x")

        write = runs.write_report
        monkeypatch.setattr(runs, "write_report", lambda folder: (write(folder), plant(0)))
        with pytest.raises(
            UsageError, match=r"out: expected a free name .*--resume .*out\.partial"
        ):
            start(out)
        assert (partial / f"checkpoints/{TASK}.pt").exists()
        assert "move it away first" in refused(partial)
        out.rename(tmp_path / "away")
        shutil.rmtree(partial / "checkpoints")  # as an older version did first
        monkeypatch.setattr(runs, "train", None)  # nothing is trained again
        assert contents(resume(out, console=quiet())) == contents(unbroken)

    def test_a_report_that_fails_loses_nothing(self, unbroken, tmp_path, monkeypatch):
        def fail(_):
            raise RuntimeError("no fonts")

        with monkeypatch.context() as patch:
            patch.setattr(plots, "_png", fail)
            with pytest.raises(
                UsageError, match=r"no fonts.* is trained and kept, continue with: "
            ):
                start(tmp_path / "out")
        monkeypatch.setattr(training, "_train_epoch", None)
        assert contents(resume(tmp_path / "out", console=quiet())) == contents(unbroken)

    def test_a_finished_run_is_tidied(self, unbroken, tmp_path):
        """The process died after it gave the name: its resume removes what is left."""
        out = shutil.copytree(unbroken, tmp_path / "out")
        (out / ".lock").touch()
        (out / ".0123456789abcdef.tmp").touch()
        assert resume(tmp_path / "out.partial", console=quiet()) == out
        assert {p.name for p in out.iterdir()} == {p.name for p in unbroken.iterdir()}
        assert (out / f"checkpoints/{TASK}.pt").exists()
        assert "which is finished; open its report" in refused(out)

    def test_checkpoints_that_were_not_to_be_kept_are_removed(self, tmp_path):
        out = start(tmp_path / "out", keep_checkpoints=False)
        assert not (out / "checkpoints").exists()
        (out / "checkpoints").mkdir()
        assert resume(out, console=quiet()) == out
        assert not (out / "checkpoints").exists()


class TestSaid:
    def test_a_name_that_is_markup(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as left:
            main(["train", "erm", "--config", str(CONFIG), "--epochs", "1", "--out", "[b] :cat:"])
        assert left.value.code == 0
        assert capsys.readouterr().out.splitlines()[-1] == "[b] :cat:/report.html"

    def test_another_processor(self, stopped):
        record = json.loads((stopped / "config.json").read_text())
        record["machine"]["processor"] = "abacus"
        write_record(stopped / "config.json", record)
        heard = io.StringIO()
        resume(stopped, console=Console(file=heard, width=500))
        assert "(was abacus): the rest may differ in rounding" in heard.getvalue()

    def test_other_versions(self, stopped, tmp_path):
        path = stopped / "config.json"
        record = json.loads(path.read_text())
        record["versions"] |= {"torch": "1.0", "numpy": None}
        write_record(path, record)
        heard = io.StringIO()
        out = resume(stopped, console=Console(file=heard))
        said = f"resumed with torch {torch.__version__} (was 1.0), numpy"
        assert said.split("+")[0] in heard.getvalue()
        assert heard.getvalue().count("may differ in rounding") == 1
        assert (
            f"resumed with torch {torch.__version__}".split("+")[0]
            in (out / "report.html").read_text()
        )

    def test_the_same_versions(self, stopped):
        heard = io.StringIO()
        resume(stopped, console=Console(file=heard))
        assert "resumed with" not in heard.getvalue()

    def test_a_relative_source_is_found_from_elsewhere(self, tmp_path, monkeypatch):
        asked = []
        runs = sys.modules["diversevit_fast.experiment.run"]
        splits = runs.load_splits()
        monkeypatch.setattr(
            runs, "load_splits", lambda *_, source, **__: asked.append(source) or splits
        )
        monkeypatch.chdir(tmp_path)
        folder = stop(tmp_path / "out", data="mnist-cifar", source="data.npz")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        resume(folder, console=quiet())
        assert asked == [str(tmp_path / "data.npz")] * 2

    def test_the_hint_can_be_typed(self, tmp_path):
        folder = stop(tmp_path / "my run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", full)
            said = refused(folder)
        assert shlex.split(said)[-1] == str(folder)

    def test_a_name_that_ends_as_an_unfinished_one(self, tmp_path):
        with pytest.raises(
            UsageError, match="a name that does not end as an unfinished run's does"
        ):
            start(tmp_path / "out.partial")


def in_a_shell(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """``script``, where ``$RUN`` starts a run in ``folder``."""
    command = (
        f"{sys.executable} -m diversevit_fast.experiment.cli train erm --config {CONFIG} --epochs 1"
    )
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        capture_output=True,
        timeout=120,
        env={**os.environ, "RUN": command, "PYTHONPATH": str(CONFIG.parents[2]), **environment},
    )


class TestHostilePlaces:
    """In processes of their own: each starts Python, so several things are tried in one."""

    def test_a_reader_that_leaves(self, tmp_path):
        done = in_a_shell("$RUN --out a 2>&1 | head -1; echo ${PIPESTATUS[0]}", tmp_path)
        assert done.stdout.splitlines()[-1] == b"0"
        assert done.stderr == b""
        assert (tmp_path / "a/report.html").exists()

    def test_streams_of_any_encoding_and_names_of_any_bytes(self, tmp_path):
        name = b"r\xff\xc3\xa9n"
        done = in_a_shell(
            "$RUN --out $'r\\xff\\xc3\\xa9n'",
            tmp_path,
            PYTHONIOENCODING="ascii",
            MPLBACKEND="module://matplotlib_inline.backend_inline",
        )
        assert done.returncode == 0, done.stderr
        assert os.listdir(os.fsencode(tmp_path)) == [name]
        assert b"r\xff" in done.stdout
        assert b"n/report.html" in done.stdout
        page = (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) / "report.html").read_text()
        assert "<h1>r\N{REPLACEMENT CHARACTER}én</h1>" in page

    def test_a_limit_on_the_size_of_files(self, tmp_path):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

        command = [
            sys.executable,
            "-m",
            "diversevit_fast.experiment.cli",
            "train",
            "erm",
            "--config",
            CONFIG,
        ]
        done = subprocess.run(
            [*command, "--out", tmp_path / "out"],
            preexec_fn=limit,
            capture_output=True,
            text=True,
            env={**os.environ, "DIVERSEVIT_COMPILE": "0", "PYTHONPATH": str(CONFIG.parents[2])},
        )
        assert done.returncode == 2
        assert re.fullmatch(
            r"error: \S+erm-seed0.pt: expected a place that can be written, got File too large; mend "
            r"that first, then continue with: diversevit run --resume \S+out.partial\n",
            done.stderr,
        ), done.stderr
        assert not list((tmp_path / "out.partial/checkpoints").iterdir())


def full(_: int) -> None:
    """What writing to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_last_checkpoint(stopped, unbroken, monkeypatch):
    (before,) = (stopped / "checkpoints").iterdir()
    data = before.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = refused(stopped)
    assert f"{before}: expected a place that can be written, got No space left on device" in said
    assert [p.read_bytes() for p in (stopped / "checkpoints").iterdir()] == [data]
    assert contents(resume(stopped, console=quiet())) == contents(unbroken)


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("CUDA out of memory. Tried to")])
def test_memory_that_ends_in_a_command(failure, unbroken, monkeypatch, capsys):
    def fail(*_):
        raise failure

    monkeypatch.setattr(DiverseViT, "head_logits", fail)
    monkeypatch.setattr(
        weights, "load_splits", sys.modules["diversevit_fast.experiment.run"].load_splits
    )
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(unbroken / f"{TASK}.safetensors")])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: memory: expected enough for this, got too li")


def test_no_pickle_of_a_checkpoint_runs(stopped, tmp_path):
    """Not even of one with the right checksum."""
    from diversevit_fast.experiment.run_files import write_sealed

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    file = io.BytesIO()
    torch.save({"format": 2, "model": Evil()}, file, pickle_module=pickle)
    write_sealed(stopped / f"checkpoints/{TASK}.pt", file.getvalue())
    assert "that PyTorch" in refused(stopped)
    assert not (tmp_path / "ran").exists()
