"""A sweep from the command line: every cell trained once, whatever happens to the processes that train them."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diversevit_fast.data import load_splits
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import run, sweep_work
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.run_files import write_json, write_text
from diversevit_fast.experiment.sweep import Hands
from diversevit_fast.experiment.sweep_folder import SweepFolder
from diversevit_fast.experiment.sweep_results import Results
from diversevit_fast.files import FileError
from tests.experiment.test_experiment import contents, quiet
from tests.helpers.interrupts import interrupted_after_an_epoch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
CONFIG = Path(__file__).with_name("tiny_run.json")
RUNS = sys.modules["diversevit_fast.experiment.run"]  # the package's ``run`` is its function
GRID = ("--config", CONFIG, "--penalty-weight", "0,1", "--lr", "1e-3", "--seeds", "0-1")
UNLIKE = ("seconds", "commit")


def page(folder: Path) -> Path:
    """Stand in for a run's report: pictures take longer than a tiny training."""
    write_text(folder / "report.html", "a report")
    return folder / "report.html"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    splits = load_splits("digits-photos", samples=8)
    monkeypatch.setattr(RUNS, "load_splits", lambda *_, **__: splits)
    monkeypatch.setattr(RUNS, "rehearse", lambda: None)
    monkeypatch.setattr(RUNS, "write_report", page)


def call(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        main(["sweep", *map(str, arguments)])
    assert left.value.code == code


def rows(folder: Path) -> list[dict[str, str]]:
    """What ``results.csv`` says that does not depend on when it was made."""
    with (folder / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in UNLIKE} for row in csv.DictReader(file)]


def trained(output: str) -> list[str]:
    """The cells that lines of a sweep say are done."""
    return [line.split()[1].rstrip(":") for line in output.splitlines() if ": done in" in line]


def left_over(folder: Path) -> list[str]:
    """Claims, failures and unfinished runs."""
    found = [f"{sub}/{p.name}" for sub in ("claims", "failed") for p in (folder / sub).iterdir()]
    found += [p.name for p in (folder / "cells").iterdir() if p.name.endswith(".partial")]
    return [name for name in found if name != "claims/.results.lock"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An undisturbed sweep of four cells."""
    out = tmp_path_factory.mktemp("finished") / "sweep"
    splits = load_splits("digits-photos", samples=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RUNS, "load_splits", lambda *_, **__: splits)
        patch.setattr(RUNS, "write_report", page)
        call(*GRID, "--out", out, "--workers", 1)
    return out


def test_a_sweep_trains_every_cell_as_run_does(finished, tmp_path):
    sweep = SweepFolder.open(finished)
    assert len(sweep.cells) == 4
    assert not left_over(finished)
    found = rows(finished)
    assert len(found) == 4 * 4  # selection rules
    assert {(r["penalty_weight"], r["seed"], r["lr"]) for r in found} == {
        (weight, seed, "0.001") for weight in "01" for seed in "01"
    }
    for cell in sweep.cells.values():
        alone = run(cell.settings, tmp_path / cell.name, console=quiet())
        assert contents(sweep.place(cell).out) == contents(alone)


def test_the_same_command_again_trains_nothing(finished, capsys):
    before = rows(finished)
    call(*GRID, "--out", finished, "--workers", 1)
    assert not trained(capsys.readouterr().out)
    assert rows(finished) == before


def test_status(finished, tmp_path, capsys):
    call("--out", finished, "--status")
    assert capsys.readouterr().out.strip() == "4 cells: 4 done, 0 running, 0 to do, 0 failed"
    part = tmp_path / "part"
    shutil.copytree(finished, part)
    first, second, third, _ = SweepFolder.open(part).cells.values()
    for cell in (first, second, third):
        shutil.rmtree(part / "cells" / cell.name)
    sweep = SweepFolder.open(part)
    sweep.fail(first, "it went\nwrong")
    with sweep.claims.take(second.name, None):
        call("--resume", part, "--status")
        said = capsys.readouterr().out
        assert "4 cells: 1 done, 1 running, 1 to do, 1 failed" in said
        assert f"running: {second.name}: process {os.getpid()} on " in said
        assert f"failed: {first.name}: it went wrong" in said
        assert "estimated end: 20" in said
    call("--resume", part, "--status")
    said = capsys.readouterr().out
    assert "0 running, 2 to do" in said
    assert "estimated end: none, nobody works on it" in said


def test_a_cell_that_fails_does_not_stop_the_rest(tmp_path, capsys):
    out = tmp_path / "out"
    grid = ("--config", CONFIG, "--lr", "1e30,1e-3", "--epochs", "12", "--seeds", "0-1")
    call(*grid, "--out", out, "--workers", 1, code=1)
    said = capsys.readouterr().out
    assert len(trained(said)) == 2
    assert said.count("failed: loss: expected a finite number") == 2
    assert "2 done, 2 failed" in said
    assert {row["lr"] for row in rows(out)} == {"0.001"}
    call("--resume", out, "--workers", 1, code=1)  # still recorded, and not tried again
    assert (
        "failed: loss"
        not in capsys.readouterr().out.split("cells, 2 done")[1].split("failed: lr")[0]
    )
    (name,) = [c.name for c in SweepFolder.open(out).cells.values() if c.seed == 1][:1]
    write_json(out / "failed" / f"{name}.json", {"reason": "another"})
    call("--resume", out, "--retry", "--workers", 1, code=1)
    assert "another" not in capsys.readouterr().out


def test_a_bug_in_a_cell_is_recorded_with_where_it_was(tmp_path, monkeypatch):
    def break_down(*_, **__):
        raise ZeroDivisionError("here")

    monkeypatch.setattr(sweep_work, "run", break_down)
    out = tmp_path / "out"
    call(*GRID, "--out", out, "--workers", 1, code=1)
    said = json.loads(next((out / "failed").iterdir()).read_text())
    assert said["reason"] == "ZeroDivisionError: here"
    assert "in break_down" in said["details"]


def test_an_interrupt_leaves_a_sweep_that_is_resumed_to_the_same_end(tmp_path, finished, capsys):
    out = tmp_path / "out"
    with interrupted_after_an_epoch():
        call(*GRID, "--out", out, "--workers", 1, code=130)
    assert f"continue with: diversevit sweep --resume {out}" in capsys.readouterr().err
    assert [name for name in left_over(out) if not name.endswith(".partial")] == []
    assert len(list((out / "cells").glob("*.partial"))) == 1
    call("--resume", out, "--workers", 1)
    assert len(trained(capsys.readouterr().out)) == 4
    assert rows(out) == rows(finished)
    assert not left_over(out)


SLOW = """
import sys, time
from diversevit_fast.experiment import progress, run_files
from diversevit_fast.experiment.cli import main
from diversevit_fast.data import load_splits
runs = sys.modules["diversevit_fast.experiment.run"]
splits = load_splits("digits-photos", samples=8)
runs.load_splits = lambda *_, **__: splits
runs.rehearse = lambda: None
def page(folder):
    run_files.write_text(folder / "report.html", "a report")
runs.write_report = page
done = progress.Progress.epoch_done
def epoch_done(self, *arguments):
    done(self, *arguments)
    print("epoch", flush=True)
    time.sleep({seconds})
progress.Progress.epoch_done = epoch_done
main(["sweep", *sys.argv[1:]])
"""


def start(*arguments: object, seconds: float = 0.0) -> subprocess.Popen:
    """Start a sweep in a process of its own, that waits after each epoch."""
    command = [sys.executable, "-c", SLOW.format(seconds=seconds), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_a_process_that_is_killed_leaves_a_sweep_that_is_resumed_to_the_same_end(
    tmp_path, finished, capsys
):
    out = tmp_path / "out"
    with start(*GRID, "--out", out, "--workers", 1, seconds=600) as process:
        try:
            assert process.stdout is not None
            while process.stdout.readline().strip() != "epoch":
                assert process.poll() is None
            capsys.readouterr()
            call("--out", out, "--status")
            assert "1 running, 3 to do" in capsys.readouterr().out
        finally:
            process.kill()
    assert len(left_over(out)) == 2  # a claim and an unfinished run
    call("--out", out, "--status")
    said = capsys.readouterr().out
    assert "0 running, 4 to do" in said
    assert f"process {process.pid} on" in said
    assert "is gone" in said
    call("--resume", out, "--workers", 1)
    assert rows(out) == rows(finished)
    assert not left_over(out)


def test_two_processes_on_one_folder_train_each_cell_once(tmp_path, finished):
    out = tmp_path / "out"
    command = (*GRID, "--out", out, "--workers", 1)
    with start(*command, seconds=0.3) as one, start(*command, seconds=0.3) as other:
        said = [process.communicate(timeout=300)[0] for process in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0]
    cells = [trained(text) for text in said]
    assert all(cells), "one of them did all the work, so nothing was tested"
    assert sorted(cells[0] + cells[1]) == sorted(SweepFolder.open(out).cells)
    assert sum(text.count("epoch\n") for text in said) == 4 * 2
    assert rows(out) == rows(finished)
    assert not left_over(out)


def test_workers_train_what_one_process_trains(tmp_path, finished, capsys):
    out = tmp_path / "out"
    call(*GRID, "--out", out, "--workers", 2)
    assert sorted(trained(capsys.readouterr().out)) == sorted(SweepFolder.open(out).cells)
    assert [r | {"threads": ""} for r in rows(out)] == [r | {"threads": ""} for r in rows(finished)]
    assert not left_over(out)


def test_workers_that_are_killed_make_it_fail_and_are_made_up_for(tmp_path, finished, capsys):
    """Each kills itself over its first cell; the cells go on from where they were."""
    out = tmp_path / "out"
    code = (
        "import os, signal\n"
        "from diversevit_fast.experiment.progress import Progress\n"
        "Progress.epoch_done = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        call(*GRID, "--out", out, "--workers", 2, code=1)
    said = capsys.readouterr().out
    assert said.count("ended with status -9") == 2
    assert "0 done, 4 left" in said
    call("--resume", out, "--workers", 1)
    assert rows(out) == rows(finished)


def test_an_interrupt_ends_the_workers_and_releases_their_cells(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diversevit_fast.experiment.cli", "sweep"]
    command += [*map(str, GRID), "--out", str(out), "--workers", "2", "--epochs", "5000"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts jobs in the background makes them, and so this child, ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for _ in range(1200):
            if len(list(out.glob("cells/*.partial/checkpoints/*.pt"))) == 2:
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert "continue with: diversevit sweep --resume" in process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert not [name for name in left_over(out) if name.startswith("claims")]
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in read(p)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_shards_share_a_sweep(tmp_path, finished, capsys):
    out = tmp_path / "out"
    call(*GRID, "--out", out, "--workers", 1, "--shard", "1/2")
    first = trained(capsys.readouterr().out)
    assert first == list(SweepFolder.open(out).cells)[::2]
    call("--resume", out, "--workers", 1, "--shard", "2/2")
    assert trained(capsys.readouterr().out) == list(SweepFolder.open(out).cells)[1::2]
    assert rows(out) == rows(finished)


def test_a_cell_that_kills_its_processes_is_given_up(tmp_path, capsys):
    out = tmp_path / "out"
    with interrupted_after_an_epoch():
        call(*GRID, "--out", out, "--workers", 1, code=130)
    sweep = SweepFolder.open(out)
    name = next(iter(sweep.cells))
    sweep.claims.take(name, None)
    for generation in range(sweep_work.MOST_DEATHS):
        path = out / "claims" / f"{name}.{generation}"
        path.write_text(
            json.dumps({**json.loads((out / "claims" / f"{name}.0").read_text()), "born": "1"})
        )
    call("--resume", out, "--workers", 1, code=1)
    assert f"failed: {name}: 3 processes died over it" in capsys.readouterr().out
    assert len(rows(out)) == 3 * 4


@pytest.mark.parametrize("file", ["results.csv", "config.json", "sweep.html"])
def test_a_full_disk_loses_nothing(tmp_path, finished, capsys, monkeypatch, file):
    out, replace = tmp_path / "out", os.replace
    full = True

    def on_a_full_disk(source, target):
        if full and Path(target).name == file:
            raise OSError(28, os.strerror(28))
        replace(source, target)

    monkeypatch.setattr(os, "replace", on_a_full_disk)
    call(*GRID, "--out", out, "--workers", 1, code=2)
    said = capsys.readouterr().err
    assert "No space left" in said
    assert said.count("\n") == 1
    assert f"diversevit sweep --resume {out}" in said
    assert not list(out.rglob(".*.tmp"))
    full = False
    call("--resume", out, "--workers", 1)
    assert rows(out) == rows(finished)


def test_results_are_of_the_cells_they_say(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    sweep = SweepFolder.open(out)
    first, second, *_ = sweep.cells.values()
    shutil.rmtree(out / "cells" / first.name)
    (out / "cells" / second.name).rename(out / "cells" / first.name)
    with pytest.raises(
        UsageError, match="sweep: expected the settings of this cell, got others in"
    ):
        Results(sweep).update()


def test_other_data_than_it_began_with_are_refused(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    call(*GRID, "--out", out, "--workers", 1, "--shard", "4/4")
    other = load_splits("digits-photos", samples=8, seed=1)
    monkeypatch.setattr(RUNS, "load_splits", lambda *_, **__: other)
    shutil.rmtree(out / "data")  # else the sweep goes on with what it prepared
    call("--resume", out, "--workers", 1, code=2)
    assert "data: expected what the sweep started with, got other data" in capsys.readouterr().err
    assert not left_over(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0-1"), "out: expected the folder of the sweep, got none"),
        (("--out", "new"), "seeds: expected seeds such as 0-9, got none"),
        (("--out", "new", "--seeds", "0-1", "--lr", ""), "lr: expected a comma list"),
        (("--out", "new", "--seeds", "0,0"), "seeds: expected different values, got 0 twice"),
        (("--out", "new", "--seeds", "0-1", "--lr", "1,1.0"), "lr: expected different values"),
        (("--out", "new", "--seeds", "0-3", "--pilot-seeds", "3-5"), "seeds that are not reported"),
        (("--out", "new", "--seeds", "0-1", "--shard", "3/2"), "shard: expected one of n shards"),
        (("--out", "new", "--seeds", "0-1", "--workers", "0"), "workers: expected a number from 1"),
        (("--out", "new", "--seeds", "0-1", "--per-gpu", "2"), "per-gpu: expected --gpus beside"),
        (("--out", "new", "--seeds", "0-1", "--gpus", "0,0"), "gpus: expected different GPUs"),
        (("--out", "new", "--seeds", "0-1", "--retry"), "retry: expected --resume FOLDER"),
        (
            ("--out", "new", "--seeds", "0-1", "--gpus", "0", "--workers", "2"),
            "--workers or --gpus",
        ),
        (("--out", "new", "--seeds", "0-1", "--stale-after", "0"), "stale-after: expected minutes"),
        (("--out", "new", "--seeds", "0-1", "--layers", "7"), "layers: expected"),
        (("--out", "", "--seeds", "0-1"), "out: expected the name of a folder"),
        (("--resume", "nowhere"), "resume: expected the folder of a sweep, got no folder"),
        (("--resume", "."), "which has no sweep.json"),
        (("--resume", "nowhere", "--lr", "1"), "resume: expected no setting, got --lr"),
        (("--status",), "status: expected only the folder of a sweep, got nothing"),
        (("--status", "--out", "nowhere", "--lr", "1"), "got --lr, --out"),
        (("--out", ".", "--seeds", "0-1"), "which is something else; choose another --out"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extra = ("--config", CONFIG) if "--seeds" in arguments else ()
    call(*arguments, *extra, code=2)
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--penalty-weight", "0,1,2"), "a sweep that differs in penalty_weight;"),
        (("--seeds", "0-2"), "a sweep that differs in seeds;"),
        (("--epochs", "3"), "a sweep that differs in epochs;"),
        (("--pilot-seeds", "7-8"), "a sweep that differs in pilot_seeds;"),
    ],
)
def test_another_grid_does_not_go_into_the_folder(change, message, finished, capsys):
    before = sorted(finished.rglob("*"))
    call(*GRID, *change, "--out", finished, "--workers", 1, code=2)
    assert message in capsys.readouterr().err
    assert sorted(finished.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 0}, "resume: expected a sweep of format 1, got format 0"),
        ({"grid": {}}, "it was changed or damaged"),
        ({"sha256": "x"}, "it was changed or damaged"),
    ],
)
def test_a_folder_of_another_version_or_damaged(changes, message, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    record = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps({**record, **changes}))
    call("--resume", out, code=2)
    assert message in capsys.readouterr().err
    (out / "sweep.json").write_text("{")
    call("--resume", out, code=2)
    assert "resume: expected a JSON file" in capsys.readouterr().err


def test_a_failing_system_is_no_failing_cell(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise FileError("no")

    monkeypatch.setattr(sweep_work, "run", refuse)
    out = tmp_path / "out"
    call(*GRID, "--out", out, "--workers", 1, code=2)
    assert not left_over(out)


@pytest.mark.parametrize(
    ("hands", "on_cpu", "wanted"),
    [
        (Hands(gpus=("0", "1"), per_gpu=2), False, ["0", "1", "0", "1"]),
        (Hands(gpus=("3",)), False, ["3"]),
        (Hands(workers=2), True, [None, None]),
        (Hands(workers=9), True, [None] * 5),
        (Hands(), False, [None]),
        (Hands(), True, [None] * 4),
    ],
)
def test_what_the_workers_get(hands, on_cpu, wanted, monkeypatch):
    monkeypatch.setattr(sys.modules["diversevit_fast.experiment.sweep"], "cores", lambda: 8)
    found = hands.environments(5, 2, on_cpu)
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in found] == wanted


def test_recipes_and_models_vary(tmp_path, capsys):
    """From the command line: every combination, each model from its own weights."""
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    config = {k: v for k, v in json.loads(CONFIG.read_text()).items() if k != "penalty_weight"}
    (tmp_path / "tiny.json").write_text(json.dumps({**config, "epochs": 1}))
    words = ["--config", tmp_path / "tiny.json", "--seeds", "0-0", "--workers", 1]
    words += ["--penalty-weight", "0", "--out", tmp_path / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        models = ["--model", "timm:test_vit,diversevit", "--weights", "vit.pth,none"]
        call(*words, *models, "--optimizer", "adam,sgd")
    found = rows(tmp_path / "out")
    kinds = {(r["architecture"], r["pretrained"], r["optimizer"], r["model.dim"]) for r in found}
    assert kinds == {
        ("timm:test_vit", str(tmp_path / "vit.pth"), "adam", ""),
        ("timm:test_vit", str(tmp_path / "vit.pth"), "sgd", ""),
        ("diversevit", "", "adam", "4"),
        ("diversevit", "", "sgd", "4"),
    }
    assert "weights of timm:test_vit" in (tmp_path / "out/sweep.html").read_text()
    # other weights under the same name are no longer that sweep
    shutil.rmtree(next((tmp_path / "out/cells").iterdir()))
    torch.save({}, tmp_path / "vit.pth")
    capsys.readouterr()
    call("--resume", tmp_path / "out", "--workers", 1, code=2)
    said = capsys.readouterr().err
    assert said.startswith("error: pretrained: expected ")
    assert "vit.pth as the sweep started with it, got other weights; restore" in said
    assert said.count("\n") == 1
