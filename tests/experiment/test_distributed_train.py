"""Two real gloo ranks train as one process does: DDP, FSDP2, resuming, and failures without a hang.

Values are compared in float64, where only the order of sums differs. Run as a script, this file is what
the ranks do; one test goes through ``torchrun`` itself.
"""

import csv
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import evaluate, metrics, resolve, resume, run
from diversevit_fast.experiment import train as training
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.distributed import OneProcess, Ranks, resume_command
from diversevit_fast.experiment.progress import Progress
from diversevit_fast.experiment.run import Interrupted
from diversevit_fast.models import DiverseViT

rich_console = pytest.importorskip("rich.console")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)

ROOT = Path(__file__).parents[2]
MODEL = {
    **{"patch_size": 16, "dim": 16, "depth": 2},
    **{"num_heads": 3, "head_dim": 8, "mlp_dim": 16},
}
# 64 images in batches of 21: shares of 11 and 10, and a last batch smaller than the ranks
TINY = {
    **{"samples": 64, "epochs": 2, "batch_size": 21, "threads": 1, "workers": 1, "device": "cpu"},
    **{"methods": ("diversevit",), "seeds": (0,), "model": MODEL},
}
CASES = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "erm": {"methods": ("erm",)},
    "ddp every": {"layers": "all", "every": 2},
    "fsdp output": {"fsdp": True, "layers": "all", "wrt": "output"},
    "fsdp sample": {"fsdp": True, "layers": (0,), "granularity": "sample"},
}
FRACTION = {"fraction": 0.5, "batch_size": 20}
TOLERANCE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}  # metrics.csv keeps nine digits


def settings(**changes):
    return resolve({**TINY, **changes})


def quiet():
    return rich_console.Console(file=io.StringIO())


@contextmanager
def in_float64():
    """Models that are built inside, and the images they are given, are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for module in (training, evaluate):
            plain = module.batches
            patch.setattr(
                module,
                "batches",
                lambda *a, _plain=plain, **k: ((x.double(), *rest) for x, *rest in _plain(*a, **k)),
            )
        yield patch
    torch.set_default_dtype(before)


@contextmanager
def at_step(epoch: int, step: int, act):
    """Calls ``act`` after that step (the first is 1) of the epoch that follows ``epoch`` whole ones."""
    done, stepped = Progress.epoch_done, Progress.stepped
    count = {"epochs": 0, "steps": 0}

    def epoch_done(self, *args):
        count["epochs"] += 1
        done(self, *args)

    def after_step(self, *args):
        stepped(self, *args)
        count["steps"] += count["epochs"] >= epoch
        if count["steps"] == step:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "epoch_done", epoch_done)
        patch.setattr(Progress, "stepped", after_step)
        yield


def interrupt():
    raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name} {name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in DiverseViT.load(path).state_dict().items()
    }


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if k not in metrics.TIMING}
            for row in csv.DictReader(file)
        ]


def assert_alike(got: Path, wanted: Path, exactly: bool = False) -> None:
    """The same weights of every kept epoch, metrics and cosines, to rounding or bit for bit."""
    exact: dict[str, Any] = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weights(got), weights(wanted), **exact if exactly else TOLERANCE)
    cosines = [json.loads((f / "cosines.json").read_text()) for f in (got, wanted)]
    for one, other in zip(*(list(c.values()) for c in cosines), strict=True):
        torch.testing.assert_close(
            [torch.tensor(one[key]) for key in ("before", "after")],
            [torch.tensor(other[key]) for key in ("before", "after")],
            **TOLERANCE,
        )
    for one, other in zip(rows(got), rows(wanted), strict=True):
        numbers = ("accuracy", "worst_group", "loss", "penalty")
        assert {k: v for k, v in one.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }
        for name in numbers:
            value, expect = one[name], other[name]
            assert bool(value) == bool(expect)
            if expect:
                assert float(value) == pytest.approx(float(expect), rel=1e-8, abs=1e-10), name


def launch(*arguments: str, count: int = 2, limit: float = 300) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of every rank of a command that runs as ``count`` ranks.

    Raises ``TimeoutExpired`` after ``limit`` seconds: a rank that waits for one that left waits 1800.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    group |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                **{k: str(v) for k, v in (group | {"RANK": r, "LOCAL_RANK": r}).items()},
            },
        )
        for r in range(count)
    ]
    end = time.monotonic() + limit
    try:
        said = [p.communicate(timeout=max(0.1, end - time.monotonic())) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(p.returncode, *both) for p, both in zip(processes, said, strict=True)]


def train_all(folder: Path, rank: int) -> None:
    """What the ranks of the fixture ``trained`` do."""
    with in_float64() as patch:
        for name, changes in CASES.items():
            run(settings(**changes), folder / name, console=quiet())
        for name in ("ddp", "fsdp"):
            stop(settings(**CASES[name]), folder / f"{name} stopped", rank)
            stop(settings(**CASES[name]), folder / f"{name} resumed", rank)
            resume(folder / f"{name} resumed", console=quiet())
        drawn = []
        patch.setattr(training, "training_loss", watching(drawn))
        for name in ("drawn", "drawn resumed"):
            if name == "drawn":
                run(settings(**FRACTION), folder / name, console=quiet())
            else:
                stop(settings(**FRACTION), folder / name, rank)
                resume(folder / name, console=quiet())
        (folder / f"drawn-{rank}.json").write_text(json.dumps(drawn))
    with in_float64() as patch:
        patch.setattr(Ranks, "backward", lambda self, loss, kept, batch: loss.backward())
        run(settings(), folder / "unweighted", console=quiet())


def watching(drawn: list):
    """``training_loss`` that notes the drawn samples, and checks that the steps run under DDP."""
    plain = training.training_loss

    def training_loss(model, diversity, *args):
        assert isinstance(model, DistributedDataParallel)
        result = plain(model, diversity, *args)
        drawn.append(None if diversity.samples is None else diversity.samples.tolist())
        return result

    return training_loss


def stop(chosen, out: Path, rank: int) -> None:
    with at_step(1, 2, interrupt), pytest.raises(Interrupted, match="torchrun --nproc-per-node 2"):
        run(chosen, out, console=quiet())


def command(folder: Path, rank: int) -> None:
    """A command line; rank 1 is killed in epoch 2, or meets NaN there, as ``folder`` says."""
    arguments = ["train", "diversevit", "--config", str(folder / "tiny.json")]
    arguments += ["--out", str(folder / "out")]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    with in_float64() as patch, at_step(1, 2, die if folder.name == "killed" and rank else int):
        if folder.name == "diverged" and rank:
            plain, calls = training.training_loss, []

            def diverging(*args):
                calls.append(1)
                logits, loss, penalty = plain(*args)
                return logits, loss * (float("nan") if len(calls) > 5 else 1), penalty

            patch.setattr(training, "training_loss", diverging)
        if folder.name == "other data" and rank:
            patch.setattr(sys.modules["diversevit_fast.experiment.run"], "fingerprint", str)
        main(arguments)


JOBS = {"train_all": train_all, "command": command}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Every case, trained by two ranks in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    for code, _, errors in launch(__file__, "train_all", str(folder)):
        assert code == 0, errors
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same settings, trained by this process; each once."""
    folder = tmp_path_factory.mktemp("alone")

    def train(name: str) -> Path:
        changes = {k: v for k, v in CASES[name].items() if k != "fsdp"}
        out = folder / json.dumps(changes)
        if not out.exists():
            with in_float64():
                run(settings(**changes), out, console=quiet())
        return out

    return train


@pytest.mark.slow
class TestTwoRanks:
    @pytest.mark.parametrize("name", CASES)
    def test_repeat_one_process(self, name, trained, alone):
        assert_alike(trained / name, alone(name))

    def test_the_comparison_bites(self, trained, alone):
        """Shares of 11 and 10 averaged as if they were alike are another training."""
        with pytest.raises(AssertionError):
            assert_alike(trained / "unweighted", alone("ddp"))

    @pytest.mark.parametrize("name", ["ddp", "fsdp"])
    def test_interrupted_and_resumed_is_unbroken(self, name, trained):
        assert_alike(trained / f"{name} resumed", trained / name, exactly=True)

    @pytest.mark.parametrize("name", ["ddp", "fsdp"])
    def test_one_process_finishes_what_ranks_began(self, name, trained, alone, tmp_path):
        shutil.copytree(trained / f"{name} stopped.partial", tmp_path / "out.partial")
        with in_float64():
            resume(tmp_path / "out", console=quiet())
        assert_alike(tmp_path / "out", alone(name))
        said = json.loads((tmp_path / "out" / "config.json").read_text())
        assert said["ranks"] == [2, 1]

    def test_one_process_can_be_interrupted_again(self, trained, alone, tmp_path):
        shutil.copytree(trained / "ddp stopped.partial", tmp_path / "out.partial")
        with in_float64():
            with at_step(0, 3, interrupt), pytest.raises(Interrupted, match=": diversevit run"):
                resume(tmp_path / "out", console=quiet())
            resume(tmp_path / "out", console=quiet())
        assert_alike(tmp_path / "out", alone("ddp"))

    def test_each_rank_draws_its_own_samples_and_again_when_resumed(self, trained):
        assert_alike(trained / "drawn resumed", trained / "drawn", exactly=True)
        drawn = [json.loads((trained / f"drawn-{rank}.json").read_text()) for rank in range(2)]
        assert drawn[0] != drawn[1]
        for mine in drawn:
            unbroken, resumed = mine[:8], mine[8:]
            assert [len(samples) for samples in unbroken] == [5, 5, 5, 1] * 2
            assert resumed == unbroken[:6] + unbroken[4:]

    def test_folder_is_that_of_one_process(self, trained, alone):
        names = [{p.name for p in folder.iterdir()} for folder in (trained / "ddp", alone("ddp"))]
        assert names[0] == names[1]
        left = [p.name for p in trained.iterdir() if p.name.endswith(".partial")]
        assert sorted(left) == ["ddp stopped.partial", "fsdp stopped.partial"]
        held = sorted(
            p.name for p in (trained / left[0] / "checkpoints/diversevit-seed0").iterdir()
        )
        assert held == ["epoch-000001"]

    def test_the_report_says_how(self, trained, alone):
        said = {name: (trained / name / "report.html").read_text() for name in ("ddp", "fsdp")}
        assert "2 ranks (DDP)" in said["ddp"]
        assert "2 ranks (FSDP2)" in said["fsdp"]
        assert "ranks" not in (alone("ddp") / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "index", "no history", "evil index", "evil value"])
def test_damaged_checkpoint_is_one_line(damage, trained, tmp_path):
    shutil.copytree(trained / "ddp stopped.partial", tmp_path / "out.partial")
    last = tmp_path / "out.partial/checkpoints/diversevit-seed0/epoch-000001"
    evil = pickle.dumps(Evil(tmp_path / "ran"))
    match damage:
        case "truncated":
            part = max(last.glob("*.distcp"), key=lambda path: path.stat().st_size)
            part.write_bytes(part.read_bytes()[:100])
        case "index":
            (last / ".metadata").write_bytes((last / ".metadata").read_bytes()[:100])
        case "no history":
            (last / "history.pt").unlink()
        case "evil index":
            (last / ".metadata").write_bytes(evil)
        case "evil value":
            plant(last, evil)
    with pytest.raises(
        UsageError, match=r"checkpoint: expected .*epoch-000001.*delete it"
    ) as error:
        resume(tmp_path / "out", console=quiet())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(last: Path, evil: bytes) -> None:
    """Put a pickle that runs something in the place of one of the optimizer's numbers."""
    with (last / ".metadata").open("rb") as file:
        index = pickle.load(file)
    at = next(v for k, v in index.storage_data.items() if k.fqn.endswith("lr"))
    path = last / at.relative_path
    at.offset, at.length = path.stat().st_size, len(evil)
    path.write_bytes(path.read_bytes() + evil)
    with (last / ".metadata").open("wb") as file:
        pickle.dump(index, file)


class TestFailures:
    @pytest.fixture
    def fails(self, request, tmp_path):
        """What two ranks of a training say that goes wrong in a named way; its folder."""
        folder = tmp_path / request.param
        folder.mkdir()
        (folder / "tiny.json").write_text(json.dumps({**TINY, "epochs": 2}))
        if request.param == "exists":
            (folder / "out").mkdir()
        first, second = launch(__file__, "command", str(folder))
        return folder, first, second

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fails", "said"),
        [
            ("exists", r"error: out: expected a new folder, got .*out, which exists; .*"),
            ("other data", r"error: data: expected the same on every rank, got different ones; .*"),
            ("diverged", r"error: loss: expected a finite number, got NaN .*epoch 2 .*"),
        ],
        indirect=["fails"],
    )
    def test_a_failure_is_said_once(self, fails, said):
        folder, first, second = fails
        assert (first[0], second[0]) == (2, 2)
        assert re.fullmatch(f"{said}\n", first[2]), first[2]
        assert second[1:] == ("", "")
        if folder.name == "diverged":
            assert list(folder.glob("out.partial/checkpoints/*/*"))
        else:
            assert not (folder / "out.partial").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("fails", ["killed"], indirect=True)
    def test_a_killed_rank_stops_the_other_and_can_be_resumed(self, fails, alone):
        folder, first, second = fails
        assert (first[0], second[0]) == (2, -signal.SIGKILL)
        assert first[2].startswith("error: ranks: expected all of them to the end"), first[2]
        assert first[2].count("\n") == 1
        assert "torchrun --nproc-per-node 2 --no-python diversevit run --resume" in first[2]
        (task,) = (folder / "out.partial/checkpoints").iterdir()
        assert [path.name for path in task.iterdir()] == ["epoch-000001"]
        with in_float64():
            resume(folder / "out", console=quiet())
        assert_alike(folder / "out", alone("ddp"))


@pytest.mark.slow
def test_ranks_refuse_the_checkpoint_of_one_process(tmp_path):
    with at_step(1, 2, interrupt), pytest.raises(Interrupted):
        run(settings(), tmp_path / "out", console=quiet())
    first, second = launch(
        "-m", "diversevit_fast.experiment.cli", "run", "--resume", str(tmp_path / "out")
    )
    said = r"error: checkpoint: expected one that ranks wrote, got .*seed0.pt; resume without .*\n"
    assert re.fullmatch(said, first[2]), first[2]
    assert (first[0], second) == (2, (2, "", ""))
    assert (tmp_path / "out.partial/checkpoints/diversevit-seed0.pt").exists()


@pytest.mark.parametrize(
    ("here", "start"),
    [
        ("16", "torchrun --nproc-per-node 16 --no-python diversevit"),
        ("8", "torchrun --nnodes 2 ... --nproc-per-node 8 --no-python diversevit"),
    ],
)
def test_how_to_resume_names_the_machines(here, start, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    ranks = OneProcess(torch.device("cpu"))
    ranks.count, ranks.launched = 16, True
    assert resume_command(Path("a run"), ranks) == f"{start} run --resume 'a run'"


@pytest.mark.slow
def test_torchrun_and_ctrl_c(tmp_path):
    """The command line as users type it: interrupted, resumed, and one report."""
    (tmp_path / "tiny.json").write_text(json.dumps({**TINY, "epochs": 20}))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start += ["-m", "diversevit_fast.experiment.cli"]
    options = ["train", "diversevit", "--fsdp", "--config", str(tmp_path / "tiny.json")]
    process = subprocess.Popen(
        [*start, *options, "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
        # a shell that starts jobs in the background makes them, and so this child, ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if "epoch  2/20" in line:
                os.kill(process.pid, signal.SIGINT)
                break
        process.stdout.read()
        said = process.stderr.read()
    folder = tmp_path / "out.partial"
    assert said.count("interrupted; continue with: ") == 1, said
    assert f"--nproc-per-node 2 --no-python diversevit run --resume {folder}\n" in said
    assert not (tmp_path / "out").exists()
    again = [*start, "run", "--resume", str(folder)]
    done = subprocess.run(again, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("DiverseViT seed 0: continues after epoch") == 1
    assert done.stdout.count("epoch 20/20") == 1
    assert done.stdout.count(str(tmp_path / "out" / "report.html")) == 1
    assert len(rows(tmp_path / "out")) == 20 * 17


if __name__ == "__main__":
    JOBS[sys.argv[1]](Path(sys.argv[2]), int(os.environ["RANK"]))
