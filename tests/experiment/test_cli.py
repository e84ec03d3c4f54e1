"""The command line: every command does its work, every mistake is one line and exit code 2."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
CliRunner = pytest.importorskip("typer.testing").CliRunner

from diversevit_fast.data import load_splits  # noqa: E402
from diversevit_fast.experiment import (  # noqa: E402
    doctor,
    metrics,
)
from diversevit_fast.experiment.cli import app, main  # noqa: E402
from diversevit_fast.experiment.evaluate import evaluate  # noqa: E402
from diversevit_fast.experiment.help_panels import PANELS  # noqa: E402
from diversevit_fast.installation import install_command  # noqa: E402
from diversevit_fast.models import DiverseViT  # noqa: E402
from diversevit_fast.ops import backends  # noqa: E402
from diversevit_fast.version import __version__  # noqa: E402

ROOT = Path(__file__).parents[2]
TINY = {
    **{"samples": 64, "epochs": 2, "batch_size": 32, "threads": 1, "workers": 1},
    "model": {
        "patch_size": 16,
        "dim": 16,
        "depth": 2,
        "num_heads": 3,
        "head_dim": 8,
        "mlp_dim": 16,
    },
}


def call(*arguments: object, code: int = 0) -> str:
    """Standard output of a command that must exit with ``code``."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> tuple[Path, str]:
    """A run's folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, call("run", "--config", config, "--seeds", 2, "--out", out, "--tensorboard")


class TestCommands:
    @pytest.mark.parametrize(
        "command",
        [
            "",
            "run",
            "train",
            "evaluate",
            "select-heads",
            "selection-study",
            "predict",
            "report",
            "doctor",
            "data",
            "data prepare",
        ],
    )
    def test_help(self, command):
        assert "Usage: " in call(*command.split(), "--help")
        assert call(*command.split(), "-h") == call(*command.split(), "--help")

    def test_version(self):
        assert call("--version") == f"diversevit {__version__}\n"

    def test_every_command_has_its_panel(self):
        shown = call("--help")
        at = [shown.index(f"─ {panel} ─") for panel in PANELS]
        assert at == sorted(at)
        assert "─ Commands ─" not in shown
        assert "Exit codes: 0 done" in shown

    def test_a_shell_completes_commands_and_options(self, monkeypatch, capsys):
        def completed(typed: str) -> list[str]:
            monkeypatch.setenv("_DIVERSEVIT_COMPLETE", "complete_bash")
            monkeypatch.setenv("COMP_WORDS", typed)
            monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
            with pytest.raises(SystemExit) as exit_:
                main([])
            assert exit_.value.code == 0
            return capsys.readouterr().out.split()

        assert completed("diversevit sel") == ["select-heads", "selection-study"]
        assert completed("diversevit doctor --js") == ["--json"]

    def test_run_shows_progress_in_plain_lines(self, finished):
        _, printed = finished
        for method in ("ERM", "DiverseViT"):
            for seed in (0, 1):
                assert f"{method} seed {seed}: 2 epochs of 2 steps" in printed
                assert f"{method} seed {seed}, epoch 2/2: " in printed
        assert "\x1b" not in printed
        assert "steps/s, loss" in printed
        assert ", penalty 0." in printed

    def test_quiet_leaves_out_progress_alone(self, config, tmp_path, finished):
        out = tmp_path / "out"
        printed = call("-q", "train", "erm", "--config", config, "--epochs", 1, "--out", out)
        assert "epoch" not in printed
        assert "steps" not in printed
        assert "cannot be judged" in printed
        loud = call("train", "erm", "--config", config, "--epochs", 1, "--out", tmp_path / "loud")
        assert "epoch 1/1: " in loud  # the next command is as loud as ever

    def test_run_prints_the_comparison_and_the_verdict(self, finished):
        folder, printed = finished
        lines = metrics.compare(metrics.read_csv(folder / "metrics.csv"))
        assert all(str(line.test_ood) in printed for line in lines)
        assert "selected head reaches" in printed
        assert str(folder / "report.html") in printed.replace("\n", "")

    def test_run_writes_events(self, finished):
        assert len(list((finished[0] / "tensorboard").glob("*/events*"))) == 4

    def test_options_reach_the_settings(self, config, tmp_path):
        call(
            *("run", "--config", config, "--out", tmp_path / "out", "--seed", 5, "--epochs", 1),
            *("--batch-size", 16, "--lr", 0.01, "--erm-lr", 0.02, "--penalty-weight", 7),
            *("--wrt", "output", "--granularity", "sample", "--layers", "0,-1"),
            *("--every", 4, "--fraction", 0.5),
            *("--correlation", 0.8, "--samples", 32, "--threads", 1, "--device", "cpu"),
        )
        got = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
        wanted = {
            **{"seeds": [5], "epochs": 1, "batch_size": 16, "lr": 0.01, "erm_lr": 0.02},
            **{"penalty_weight": 7.0, "wrt": "output", "granularity": "sample"},
            **{"every": 4, "fraction": 0.5},
            **{"layers": [0, -1], "correlation": 0.8, "samples": 32, "device": "cpu"},
            **{"preset": "quick", "data": "digits-photos", "threads": 1},
        }
        assert {name: got[name] for name in wanted} == wanted

    @pytest.mark.parametrize(("method", "lr"), [("erm", "erm_lr"), ("diversevit", "lr")])
    def test_train_is_one_method_and_seed(self, method, lr, config, tmp_path):
        out = tmp_path / "out"
        printed = call(
            *("train", method, "--seed", 3, "--config", config),
            *("--epochs", 1, "--lr", 0.02, "--out", out),
        )
        assert "cannot be judged" in printed
        weights = {p.name for p in out.glob("*.safetensors")}
        assert weights == {f"{method}-seed3.safetensors", f"{method}-seed3-last.safetensors"}
        assert json.loads((out / "config.json").read_text())["settings"][lr] == 0.02

    def test_evaluate_repeats_the_numbers_of_the_run(self, finished):
        folder, _ = finished
        rows = metrics.read_csv(folder / "metrics.csv")
        pick = metrics.SELECTED.pick(metrics.of_run(rows, "erm", 1))
        printed = call("evaluate", folder / "erm-seed1.safetensors").splitlines()
        cells = next(line for line in printed if line.split()[0] == pick["heads"]).split()[1::2]
        run = metrics.of_run(rows, "erm", 1)
        wanted = [
            f"{metrics.find(run, pick['epoch'], split, pick['heads'])['accuracy']:.3f}"
            for split in metrics.EVALUATED
        ]
        assert cells == wanted

    def test_select_heads_saves_a_model_with_the_same_accuracy(self, finished, tmp_path):
        weights = finished[0] / "diversevit-seed0-last.safetensors"
        small = tmp_path / "small.safetensors"
        printed = call("select-heads", weights, "--search", "exhaustive", "--save", small)
        line = next(line for line in printed.splitlines() if line.startswith("selected: "))
        *_, test_id, _, test_ood, _ = line.split()
        heads = line.removeprefix("selected: ").split("  ")[0]
        pruned = DiverseViT.load(small)
        assert list(pruned.kept_heads[1]) == [int(h) for h in heads.split(",")]
        splits = load_splits("digits-photos", samples=64)
        for split, said in (("test_id", test_id), ("test_ood", test_ood)):
            assert f"{evaluate(pruned, splits[split], split)[0]['accuracy']:.3f}" == said
        assert "all" in call("evaluate", small, "--config", finished[0] / "config.json")

    def test_evaluate_as_json(self, finished):
        weights = finished[0] / "erm-seed1-last.safetensors"
        found = json.loads(call("evaluate", weights, "--json"))
        assert found["of"].startswith(f"{weights} on digits-photos")
        rows = [
            {k: row[k] for k in ("split", "heads", "accuracy", "worst_group", "loss")}
            for row in metrics.read_csv(finished[0] / "metrics.csv")
            if (row["method"], row["seed"], row["epoch"]) == ("erm", 1, 2)
            and row["split"] in metrics.EVALUATED
        ]
        by_name = [
            {(r["split"], r["heads"]): r["accuracy"] for r in x} for x in (found["rows"], rows)
        ]
        assert by_name[0] == pytest.approx(by_name[1])

    @pytest.mark.parametrize("criterion", [None, "few_labels"])
    def test_select_heads_as_json(self, criterion, finished, tmp_path):
        weights, small = finished[0] / "erm-seed1-last.safetensors", tmp_path / "s.safetensors"
        rule = [] if criterion is None else ["--criterion", criterion, "--labels", 8]
        found = json.loads(call("select-heads", weights, "--json", "--save", small, *rule))
        best, *others = found["choices"]
        assert all(best["score"] >= other["score"] for other in others)
        assert found["rule"]["criterion"] == criterion
        assert found["saved"] == str(small)
        assert small.exists()
        (heads,) = best["heads"].values()
        table = call("select-heads", weights, *rule)
        line = next(line for line in table.splitlines() if line.startswith("selected: "))
        accuracies = [f"{row['accuracy']:.3f}" for row in found["selected"]]
        assert line.split("  ")[0] == "selected: " + ", ".join(map(str, heads))
        assert [cell for cell in line.split() if cell.startswith(("0.", "1."))] == accuracies

    def test_select_heads_by_worst_group(self, finished):
        weights = finished[0] / "erm-seed0.safetensors"
        printed = call("select-heads", weights, "--score", "worst_group", "--search", "greedy")
        assert "worst_group" in printed

    def test_report_names_its_file(self, finished):
        assert call("report", finished[0]).strip().endswith("report.html")


class TestDoctor:
    def test_passes(self, capsys):
        assert doctor.report_health()
        printed = capsys.readouterr().out
        assert re.search(r"^self-check cpu +passed: second-order attention", printed, re.MULTILINE)
        for name, missing in backends.unavailable().items():
            assert f"backend {name}" in printed
            assert missing is None or missing in printed
        assert "what to do" in printed

    def test_json_is_all_that_is_printed(self):
        found = json.loads(call("doctor", "--json"))
        assert found["healthy"] is found["checks"]["cpu"]["passed"] is True
        assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
        assert set(found["backends"]) == {"triton", "cpu", "reference"}
        assert "timm" in found["extras"].get("train", {"timm": None})

    @pytest.mark.parametrize("form", [[], ["--json"]], ids=["lines", "json"])
    @pytest.mark.parametrize("factor", [1.001, float("nan")])
    def test_a_wrong_backend_fails(self, factor, form, monkeypatch):
        """The self-check bites: second-order results off by one part in a thousand exit with 1."""
        from diversevit_kernels.cpu import attention as kernels

        right = kernels.attention_double_backward

        def wrong(*args):
            gq, *rest = right(*args)
            return gq * factor, *rest

        monkeypatch.setattr(kernels, "attention_double_backward", wrong)
        printed = call("doctor", *form, code=1)
        assert 'use dvf.use_backend("reference")'.replace('"', '\\"' if form else '"') in printed
        if form:
            assert json.loads(printed)["healthy"] is False
        else:
            assert re.search(r"^self-check cpu +FAILED", printed, re.MULTILINE)

    def test_it_says_what_to_do_about_what_is_missing(self):
        health = doctor.Health(
            version="0",
            python="3",
            packages={"torch": "2", "numpy": None},
            extras={"hf": {"transformers": None, "other": "1"}, "onnx": {"onnx": "1"}},
            devices={"cuda:0": "a GPU", "cpu": "1 threads"},
            backends={"triton": "Triton is not installed", "cpu": None},
            compiler=None,
        )
        numpy, compiler, gpu, extra = doctor.advise(health)
        assert numpy.endswith("pip install numpy")
        assert "C++ compiler" in compiler
        assert gpu.endswith("Triton is not installed")
        assert extra == f"if you want [hf] (transformers missing): {install_command('hf')}"
        assert doctor.advise(
            replace(health, packages={}, compiler="c++", backends={}, extras={})
        ) == [f"install the package, which only lies on Python's path: {install_command('train')}"]


MISTAKES = {
    "no such command": (["rum"], "No such command 'rum'"),
    "no such option": (["run", "--epocs", "3"], "No such option: --epocs"),
    "not a number": (["run", "--epochs", "many"], "Invalid value for '--epochs'"),
    "no such method": (["train", "sgd"], "methods: expected different methods"),
    "no such preset": (["run", "--preset", "fast"], "preset: expected one of paper, quick"),
    "no such data": (["run", "--data", "imagenet"], "data: expected one of"),
    "no source": (["run", "--data", "mnist-cifar"], "source: expected an .npz file"),
    "missing npz": (
        ["run", "--data", "mnist-cifar", "--source", "{tmp}/none.npz"],
        "none.npz, which does not exist",
    ),
    "truncated npz": (
        ["run", "--data", "mnist-cifar", "--source", "{tmp}/cut.npz"],
        "source: expected an .npz archive",
    ),
    "no such layers": (["run", "--layers", "top"], "layers: expected last, all or numbers"),
    "no seeds": (["run", "--seeds", "0"], "seeds: expected a number of seeds"),
    "seed and seeds": (["run", "--seeds", "2", "--seed", "1"], "seed: expected --seed or --seeds"),
    "unknown key": (["run", "--config", "{tmp}/keys.json"], "got epoch;"),
    "missing config": (["run", "--config", "{tmp}/none.json"], "config: expected a readable file"),
    "broken config": (["run", "--config", "{tmp}/cut.npz"], "config: expected a JSON file"),
    "out exists": (["run", "--out", "{tmp}"], "out: expected a new folder"),
    "resume nothing": (["run", "--resume", "{tmp}/none"], "resume: expected an unfinished run"),
    "resume with more": (
        ["run", "--resume", "{tmp}/none", "--epochs", "3"],
        "resume: expected no other option, got --epochs",
    ),
    "missing weights": (["evaluate", "{tmp}/none.safetensors"], "none.safetensors"),
    "foreign weights": (["evaluate", "{tmp}/cut.npz"], "expected an intact safetensors file"),
    "save exists": (
        ["select-heads", "{tmp}/none.safetensors", "--save", "{tmp}/cut.npz"],
        "save: expected a new file",
    ),
    "fsdp of one": (
        ["run", "--fsdp"],
        "fsdp: expected several ranks, got one process; start it with",
    ),
    "no run": (["report", "{tmp}"], "metrics.csv: expected a readable file"),
    "prepare nothing": (
        ["data", "prepare", "--root", "{tmp}/none", "--out", "{tmp}/new.npz"],
        "root: expected",
    ),
    "prepared already": (
        ["data", "prepare", "--root", "{tmp}", "--out", "{tmp}/cut.npz"],
        "out: expected a new file",
    ),
    "unwritable": (["run", "--out", "{tmp}/cut.npz/out", "--samples", "32"], "Not a directory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "keys.json").write_text('{"epoch": 3, "model": {"width": 2}}')
    before = sorted(tmp_path.iterdir())
    arguments, said = MISTAKES[name]
    with pytest.raises(SystemExit) as exit_:
        main([a.format(tmp=tmp_path) for a in arguments])
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [["doctor"], ["report", "x"], ["data", "prepare"]], ids=str)
def test_ranks_are_refused_where_one_process_does_it(command, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: torchrun: expected one of run, train, got {command[0]}; start ")
    assert said.count("\n") == 1


def test_a_missing_extra_is_one_line():
    code = "import sys; sys.modules['typer'] = None\nfrom diversevit_fast.experiment.cli import main\nmain([])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr.startswith("error: typer: expected an installed package")
    assert run.stderr.count("\n") == 1


def test_ctrl_c_says_how_to_resume(config, tmp_path):
    arguments = ["run", "--config", str(config), "--epochs", "500", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "diversevit_fast.experiment.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # a shell that starts jobs in the background makes them, and so this child, ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if "epoch   2/500" in line:
                os.kill(process.pid, signal.SIGINT)
                break
        process.stdout.read()
        said = process.stderr.read()
    assert process.returncode == 130
    folder = tmp_path / "out.partial"
    assert said == f"interrupted; continue with: diversevit run --resume {folder}\n"
    assert (folder / "checkpoints" / "erm-seed0.pt").exists()
