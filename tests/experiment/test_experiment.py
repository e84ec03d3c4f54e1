"""The experiment: settings, selection, training, and runs that survive being killed."""

import csv
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.data import batches, load_splits
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import Settings, metrics, resolve, resume, run
from diversevit_fast.experiment import train as training
from diversevit_fast.experiment.checkpoint import write_content
from diversevit_fast.experiment.config import PRESETS
from diversevit_fast.experiment.evaluate import evaluate, likeness
from diversevit_fast.experiment.progress import Progress
from diversevit_fast.experiment.run import Interrupted
from diversevit_fast.models import DiverseViT

rich_console = pytest.importorskip("rich.console")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
MODEL = {
    **{"patch_size": 16, "dim": 16, "depth": 2},
    **{"num_heads": 3, "head_dim": 8, "mlp_dim": 16},
}
TINY = {
    "samples": 64,
    "epochs": 2,
    "batch_size": 24,
    "seeds": (0,),
    "threads": 1,
    "workers": 1,
    "model": MODEL,
}


def settings(**changes) -> Settings:
    return resolve({**TINY, **changes})


def quiet():
    return rich_console.Console(file=io.StringIO())


def contents(folder: Path) -> dict[str, object]:
    """What a run must repeat: weights bit for bit, metrics without the timing columns."""
    weights = {
        f"{path.name} {name}": tensor.numpy().tobytes()
        for path in folder.glob("*.safetensors")
        for name, tensor in DiverseViT.load(path).state_dict().items()
    }
    with (folder / "metrics.csv").open() as file:
        rows = [
            {k: v for k, v in row.items() if k not in metrics.TIMING}
            for row in csv.DictReader(file)
        ]
    return {**weights, "metrics": rows, "cosines": (folder / "cosines.json").read_text()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return run(settings(), tmp_path_factory.mktemp("runs") / "unbroken", console=quiet())


@pytest.fixture(scope="module")
def splits():
    return load_splits("digits-photos", samples=64)


class TestSettings:
    def test_options_beat_file_beat_preset(self, tmp_path):
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"preset": "paper", "lr": 0.5, "epochs": 7}))
        got = resolve({"epochs": 3, "wrt": None}, file)
        assert (got.epochs, got.lr, got.batch_size) == (3, 0.5, PRESETS["paper"]["batch_size"])
        assert got.preset == "paper"

    def test_paper_preset_is_the_published_recipe(self):
        got = resolve({"preset": "paper"})
        assert (got.epochs, got.batch_size, got.lr, got.erm_lr) == (100, 80, 1e-3, 1e-4)
        assert (got.penalty_weight, got.layers, got.wrt, got.granularity) == (
            *(100.0, "last"),
            *("input", "token"),
        )
        assert got.model == {}

    def test_json_round_trip(self):
        one = settings(layers=(0, -1))
        assert Settings.from_json(json.loads(json.dumps(one.to_json()))) == one

    @pytest.mark.parametrize(
        ("bad", "said"),
        [
            ({"preset": "fast"}, "preset: expected one of paper, quick"),
            ({"data": "imagenet"}, "data: expected one of digits-photos, mnist-cifar"),
            ({"epochs": 0}, "epochs: expected a whole number"),
            ({"epochs": True}, "epochs: expected a whole number"),
            ({"lr": -1.0}, "lr: expected a number above 0"),
            ({"lr": math.nan}, "lr: expected a number above 0"),
            ({"lr": "fast"}, "lr: expected a number above 0"),
            ({"penalty_weight": -1}, "penalty_weight: expected"),
            ({"correlation": 1.5}, "correlation: expected a number from 0 to 1"),
            ({"seeds": ()}, "seeds: expected different whole numbers"),
            ({"seeds": (1, 1)}, "seeds: expected different whole numbers"),
            ({"seeds": ([1],)}, "seeds: expected different whole numbers"),
            ({"methods": ("sgd",)}, "methods: expected different methods"),
            ({"wrt": "weights"}, "wrt: expected input or output"),
            ({"granularity": "image"}, "granularity: expected token or sample"),
            ({"every": 0}, "every: expected a whole number of at least 1"),
            ({"every": 1.5}, "every: expected a whole number of at least 1"),
            ({"fraction": 0}, "fraction: expected a number above 0 and at most 1"),
            ({"fraction": 1.5}, "fraction: expected a number above 0 and at most 1"),
            ({"layers": "first"}, "layers: expected last, all or"),
            ({"model": {"width": 3}}, "got model.width"),
            ({"learning_rate": 1.0, "epoch": 2}, "got learning_rate, epoch"),
        ],
        ids=lambda value: json.dumps(value, default=str)[:40] if isinstance(value, dict) else "",
    )
    def test_refuses(self, bad, said):
        with pytest.raises(UsageError) as error:
            resolve(bad)
        assert said in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "expected a JSON file"),
            ("[1]", "expected a JSON object"),
            (None, "expected a readable file"),
            ('{"versions": {}, "settings": 3}', "expected settings as a JSON object"),
        ],
        ids=["truncated", "a list", "missing", "foreign"],
    )
    def test_refuses_config_files(self, text, said, tmp_path):
        file = tmp_path / "config.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(UsageError, match=said):
            resolve({}, file)


@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"),
    [
        *((1, 100, 1), (70, 100, 1), (71, 100, 0.1), (80, 100, 0.1), (81, 100, 0.01)),
        *((17, 24, 1), (18, 24, 0.1), (19, 24, 0.1), (20, 24, 0.01), (1, 1, 1)),
    ],
)
def test_learning_rate_falls_at_70_and_80_percent(epoch, epochs, factor):
    assert training.learning_rate(2.0, epoch, epochs) == pytest.approx(2 * factor)


def synthetic(method: str, seed: int, table: dict) -> list[dict]:
    """Rows from ``{(epoch, heads): (val_id, val_ood, test_id, test_ood)}``."""
    return [
        {
            **{"method": method, "seed": seed, "epoch": epoch, "split": split, "heads": heads},
            **{"accuracy": accuracy, "worst_group": accuracy / 2, "loss": 1 / 3, "seconds": 0.5},
        }
        for (epoch, heads), values in table.items()
        for split, accuracy in zip(metrics.EVALUATED, values, strict=True)
    ]


TABLE = {  # each rule picks another cell
    (1, "all"): (0.9, 0.5, 0.91, 0.51),
    (1, "0"): (0.6, 0.70, 0.61, 0.62),
    (1, "1"): (0.6, 0.70, 0.62, 0.64),
    (2, "all"): (0.8, 0.6, 0.81, 0.55),
    (2, "0"): (0.5, 0.70, 0.51, 0.80),
    (2, "1"): (0.5, 0.40, 0.52, 0.81),
}


class TestMetrics:
    @pytest.mark.parametrize(
        ("rule", "epoch", "heads"),
        list(zip(metrics.RULES, (1, 2, 1, 2), ("all", "all", "0", "1"), strict=True)),
        ids=str,
    )
    def test_rules_pick(self, rule, epoch, heads):
        rows = synthetic("erm", 0, TABLE)
        for order in (rows, rows[::-1] if rule is not metrics.SELECTED else rows):
            pick = rule.pick(order)
            assert (pick["epoch"], pick["heads"]) == (epoch, heads)

    def test_comparison_reports_test_accuracy_at_the_pick(self):
        other = {key: tuple(x + 0.1 for x in values) for key, values in TABLE.items()}
        rows = synthetic("erm", 0, TABLE) + synthetic("erm", 1, other)
        line = next(line for line in metrics.compare(rows) if line.rule is metrics.SELECTED)
        assert (line.test_id.mean, line.test_ood.mean) == pytest.approx((0.66, 0.67))
        assert line.test_ood.sd == pytest.approx(0.05)  # population, not sample: 0.0707
        assert line.worst_group.mean == pytest.approx(0.335)
        assert line.chosen == [(0, 1, "0"), (1, 1, "0")]

    def test_csv_round_trip(self, tmp_path):
        rows = synthetic("erm", 3, TABLE)
        metrics.write_csv(rows, tmp_path / "metrics.csv")
        back = metrics.read_csv(tmp_path / "metrics.csv")
        assert [r["accuracy"] for r in back] == [r["accuracy"] for r in rows]
        assert back[0]["loss"] == pytest.approx(1 / 3, rel=1e-8)
        assert back[0]["penalty"] is None


class TestEvaluation:
    def test_agrees_with_masking_head_by_head(self, splits):
        torch.manual_seed(0)
        model, data = DiverseViT(**MODEL), splits["test_id"]
        images, labels, groups = next(iter(batches(data, 64)))
        for row in evaluate(model, data, "test_id"):
            kept = range(3) if row["heads"] == "all" else [int(row["heads"])]
            with torch.no_grad(), dvf.keep_heads(model, {-1: list(kept)}):
                logits = model(images)
            hit = (logits.argmax(1) == labels).double()
            assert row["accuracy"] == pytest.approx(hit.mean().item())
            worst = min(hit[groups == g].mean().item() for g in groups.unique())
            assert row["worst_group"] == pytest.approx(worst)
            loss = F.cross_entropy(logits, labels).item()
            assert row["loss"] == pytest.approx(loss, rel=1e-5)

    def test_likeness_is_one_for_twin_heads(self, splits):
        torch.manual_seed(0)
        model = DiverseViT(**{**MODEL, "num_heads": 2})
        attn = model.blocks[-1].attn
        with torch.no_grad():
            qkv = attn.qkv.weight.view(3, 2, 8, -1)
            qkv[:, 1] = qkv[:, 0]
            attn.proj.weight[:, 8:] = attn.proj.weight[:, :8]
        images = next(iter(batches(splits["val_id"], 16)))[0]
        penalty, cosines = likeness(model, dvf.HeadDiversity(model), images)
        assert cosines[0][1] == pytest.approx(1, abs=1e-4)
        assert penalty == pytest.approx(0.5, abs=1e-3)  # two of the four entries are 1

    def test_step_adds_the_weighted_penalty_to_cross_entropy(self, splits):
        torch.manual_seed(0)
        model = DiverseViT(**MODEL)
        diversity = dvf.HeadDiversity(model)
        images, labels, _ = next(iter(batches(splits["train"], 16)))
        _, loss, penalty = training.training_loss(model, diversity, images, labels, 3.0)
        assert penalty is not None
        assert 0 < penalty.item() < 1
        assert penalty.requires_grad
        assert loss.item() == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-5)
        assert training.training_loss(model, diversity, images, labels, 0.0)[2] is None


class TestRun:
    def test_folder(self, unbroken):
        names = {p.name for p in unbroken.iterdir()}
        weights = {
            f"{method}-seed0{last}.safetensors"
            for method in ("erm", "diversevit")
            for last in ("", "-last")
        }
        files = {"metrics.csv", "config.json", "cosines.json", "report.html"}
        probes = {
            f"{m}-seed0.probes.{kind}" for m in ("erm", "diversevit") for kind in ("csv", "json")
        }
        pictures = {"curves.png", "heads.png", "cosines.png"}
        pictures |= {f"{name}.png" for name in ("use", "subsets", "decoded", "maps", "cka")}
        assert names == weights | files | probes | pictures | {"checkpoints"}
        kept = {p.name for p in (unbroken / "checkpoints").iterdir()}
        assert kept == {"erm-seed0.pt", "diversevit-seed0.pt"}
        assert not unbroken.with_name("unbroken.partial").exists()

    def test_every_epoch_split_and_head_has_a_row(self, unbroken):
        rows = metrics.read_csv(unbroken / "metrics.csv")
        cells = [(r["method"], r["epoch"], r["split"], r["heads"]) for r in rows]
        heads = ("all", "0", "1", "2")
        assert sorted(cells) == sorted(
            (method, epoch, split, head)
            for method in ("erm", "diversevit")
            for epoch in (1, 2)
            for split in ("train", *metrics.EVALUATED)
            for head in (heads if split != "train" else ("all",))
        )
        trained = [r for r in rows if r["split"] == "train"]
        assert all((r["penalty"] is None) == (r["method"] == "erm") for r in trained)

    def test_weights_are_those_of_the_selected_head(self, unbroken, splits):
        rows = metrics.read_csv(unbroken / "metrics.csv")
        for method in ("erm", "diversevit"):
            pick = metrics.SELECTED.pick(metrics.of_run(rows, method, 0))
            model = DiverseViT.load(unbroken / f"{method}-seed0.safetensors")
            again = {r["heads"]: r for r in evaluate(model, splits["val_ood"], "val_ood")}
            assert again[pick["heads"]]["loss"] == pytest.approx(pick["loss"], rel=1e-6)

    def test_config_repeats_the_run(self, unbroken):
        assert resolve({}, unbroken / "config.json") == settings()

    def test_methods_start_alike(self, unbroken):
        cosines = json.loads((unbroken / "cosines.json").read_text())
        assert cosines["erm-seed0"]["before"] == cosines["diversevit-seed0"]["before"]
        assert cosines["erm-seed0"]["after"] != cosines["diversevit-seed0"]["after"]

    @pytest.mark.parametrize("suffix", ["", ".partial"])
    def test_refuses_an_existing_folder(self, suffix, tmp_path):
        (tmp_path / f"out{suffix}").mkdir()
        with pytest.raises(UsageError, match="out: expected a new folder"):
            run(settings(), tmp_path / "out")
        assert not any((tmp_path / f"out{suffix}").iterdir())

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"layers": (7,)}, "layers: expected"),
            ({"model": {"patch_size": 7}}, "image_size: expected"),
            ({"samples": 63}, "samples: expected"),
            ({"device": "abacus"}, "device: expected"),
            ({"data": "mnist-cifar"}, "source: expected"),
            ({"data": "mnist-cifar", "source": "nowhere.npz"}, "nowhere.npz, which does not exist"),
        ],
        ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
    )
    def test_bad_settings_leave_nothing_behind(self, changes, said, tmp_path):
        with pytest.raises(UsageError, match=said):
            run(settings(**changes), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("cut", [0, 1000], ids=["empty", "truncated"])
    def test_damaged_data_is_one_line(self, cut, tmp_path):
        (tmp_path / "data.npz").write_bytes(b"PK\x03\x04" + bytes(cut))
        with pytest.raises(UsageError, match=r"source: expected an \.npz archive"):
            run(settings(data="mnist-cifar", source=str(tmp_path / "data.npz")), tmp_path / "out")


def interrupt_after(monkeypatch, epochs: int, steps: int) -> None:
    """Ctrl-C in step ``steps`` of the first training that has done ``epochs`` epochs."""
    done, stepped = Progress.epoch_done, Progress.stepped
    count = {"epochs": 0, "steps": 0}

    def epoch_done(self, *args):
        count["epochs"] += 1
        done(self, *args)

    def step(self, *args):
        count["steps"] += count["epochs"] >= epochs
        stepped(self, *args)
        if count["steps"] > steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "epoch_done", epoch_done)
    monkeypatch.setattr(Progress, "stepped", step)


class TestResume:
    @pytest.mark.parametrize(("epochs", "steps"), [(0, 2), (1, 1), (3, 1)], ids=str)
    def test_interrupted_run_continues_to_the_same_bits(
        self, epochs, steps, unbroken, tmp_path, monkeypatch
    ):
        with monkeypatch.context() as patch:
            interrupt_after(patch, epochs, steps)
            with pytest.raises(Interrupted, match=r"diversevit run --resume .*out\.partial"):
                run(settings(), tmp_path / "out", console=quiet())
        assert not (tmp_path / "out").exists()
        folder = resume(tmp_path / ("out" if epochs % 2 else "out.partial"), console=quiet())
        assert folder == tmp_path / "out"
        assert contents(folder) == contents(unbroken)

    def test_amortised_run_continues_to_the_same_bits(self, tmp_path, monkeypatch):
        """The schedule of ``every`` and the draws of ``fraction`` go on where they were."""
        chosen = settings(methods=("diversevit",), every=2, fraction=0.5)
        steps, drawn = [], []
        training_loss = training.training_loss

        def spy(model, diversity, *args):
            result = training_loss(model, diversity, *args)
            steps.append((diversity.step, result[2].item() > 0))
            if result[2] > 0:
                drawn.append(diversity.samples.tolist())
            return result

        monkeypatch.setattr(training, "training_loss", spy)
        unbroken = contents(run(chosen, tmp_path / "unbroken", console=quiet()))
        assert steps == [(1, True), (2, False), (3, True), (4, False), (5, True), (6, False)]
        assert len({tuple(samples) for samples in drawn}) == len(drawn) == 3
        steps.clear()
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1, 1)
            with pytest.raises(Interrupted):
                run(chosen, tmp_path / "out", console=quiet())
        assert len(steps) == 5
        steps.clear()
        assert contents(resume(tmp_path / "out", console=quiet())) == unbroken
        assert steps == [(4, False), (5, True), (6, False)]

    def test_amortised_run_is_measured_on_every_sample(self, tmp_path):
        chosen = settings(methods=("diversevit",), epochs=1, every=4, fraction=0.25)
        folder = run(chosen, tmp_path / "out", console=quiet())
        said = "every 4 steps, of a fraction 0.25 of each batch"
        assert said in (folder / "report.html").read_text()
        model = DiverseViT.load(folder / "diversevit-seed0-last.safetensors")
        split = load_splits("digits-photos", samples=64)["val_id"]
        images = next(iter(batches(split, training._LIKENESS_IMAGES)))[0]
        expect, _ = likeness(model, dvf.HeadDiversity(model), images)
        with (folder / "metrics.csv").open() as file:
            row = next(r for r in csv.DictReader(file) if r["split"] == "val_id")
        assert float(row["penalty"]) == pytest.approx(expect, rel=1e-4)

    def test_killed_run_continues_to_the_same_bits(self, unbroken, tmp_path):
        config = tmp_path / "tiny.json"
        config.write_text(json.dumps({**TINY, "seeds": [0]}))
        arguments = ["run", "--config", str(config), "--out", str(tmp_path / "out")]
        process = subprocess.Popen(
            [sys.executable, "-m", "diversevit_fast.experiment.cli", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if "DiverseViT seed 0, epoch 1/2" in line:
                    os.kill(process.pid, signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
        assert contents(resume(tmp_path / "out", console=quiet())) == contents(unbroken)

    @pytest.fixture
    def stopped(self, tmp_path, monkeypatch) -> Path:
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1, 0)
            with pytest.raises(Interrupted):
                run(settings(), tmp_path / "out", console=quiet())
        return tmp_path / "out.partial"

    def test_another_order_of_batches_would_be_noticed(self, stopped, unbroken, monkeypatch):
        """The comparison bites: resuming with one other shuffle gives other bits."""
        shuffler = training.shuffler
        monkeypatch.setattr(
            training, "shuffler", lambda seed, epoch: shuffler(seed + (epoch == 2), epoch)
        )
        assert contents(resume(stopped, console=quiet())) != contents(unbroken)

    @pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "foreign", "format"])
    def test_damaged_checkpoint_is_one_line(self, damage, stopped):
        path = stopped / "checkpoints" / "erm-seed0.pt"
        content = torch.load(path, weights_only=True)
        match damage:
            case "truncated":
                path.write_bytes(path.read_bytes()[:2000])
            case "empty":
                path.write_bytes(b"")
            case "pickle":
                path.write_bytes(pickle.dumps(time.sleep))
            case "foreign":
                other = content["run"].replace('"epochs": 2', '"epochs": 3')
                write_content(path, {**content, "run": other})
            case "format":
                write_content(path, {"weights": content["model"]})
        got = {"foreign": "of another run", "format": "another format"}.get(damage, "a damaged one")
        said = rf"checkpoint: expected .*erm-seed0\.pt, got .*{got}.*delete it"
        with pytest.raises(UsageError, match=said):
            resume(stopped, console=quiet())

    def test_a_deleted_checkpoint_is_trained_again(self, stopped, unbroken):
        (stopped / "checkpoints" / "erm-seed0.pt").unlink()
        assert contents(resume(stopped, console=quiet())) == contents(unbroken)

    def test_other_data_are_refused(self, stopped):
        config = json.loads((stopped / "config.json").read_text())
        config["splits"]["train"]["sha256"] = "0" * 64
        (stopped / "config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match="data: expected the data that"):
            resume(stopped, console=quiet())

    @pytest.mark.parametrize("case", ["nothing", "finished", "no config", "no settings"])
    def test_nothing_to_resume(self, case, unbroken, tmp_path):
        folder = unbroken if case == "finished" else tmp_path / "out"
        if case.startswith("no "):
            (tmp_path / "out.partial").mkdir()
        if case == "no settings":
            (tmp_path / "out.partial" / "config.json").write_text("{}")
        with pytest.raises(UsageError, match="resume: expected"):
            resume(folder)

    def test_diverged_loss_keeps_the_last_checkpoint(self, tmp_path, monkeypatch):
        step, calls = training.training_loss, []

        def diverging(*args):
            calls.append(1)
            logits, loss, penalty = step(*args)
            return logits, loss * (math.nan if len(calls) > 4 else 1), penalty

        with monkeypatch.context() as patch:
            patch.setattr(training, "training_loss", diverging)
            with pytest.raises(
                UsageError, match=r"loss: expected a finite number, got NaN.*epoch 2"
            ):
                run(settings(), tmp_path / "out", console=quiet())
        path = tmp_path / "out.partial" / "checkpoints" / "erm-seed0.pt"
        assert torch.load(path, weights_only=True)["epoch"] == 1

    def test_absurd_learning_rate_is_one_line(self, tmp_path):
        with pytest.raises(UsageError, match="lower the learning rate") as error:
            run(settings(lr=1e30, methods=("diversevit",)), tmp_path / "out", console=quiet())
        assert "\n" not in str(error.value)
