"""Tests of the measurement of `every` and `fraction`: costs are means over periods, trainings resume and run once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.scripts import amortised
from benchmarks.scripts.amortised import ERM, VARIANTS
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment.metrics import read_csv
from diversevit_fast.experiment.progress import Progress
from diversevit_fast.models import DiverseViT

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SMALL: dict[str, Any] = {
    "patch_size": 16,
    "dim": 16,
    "depth": 2,
    "num_heads": 3,
    "head_dim": 8,
    "mlp_dim": 16,
}
TINY: dict[str, Any] = {
    "preset": "quick",
    "data": "digits-photos",
    "samples": 32,
    "epochs": 1,
    "threads": 1,
    "workers": 1,
}
TINY |= {"batch_size": 16, "model": SMALL}
FEW: dict[str, Any] = {ERM: {}, "last, every 4": {"layers": "last", "every": 4}}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        amortised, "MODELS", {"small": (lambda: (DiverseViT(**SMALL), (64, 32)), 8)}
    )


class TestCost:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_period_takes_the_penalty_once(self, variant, monkeypatch):
        """The penalty is of all samples, or of a quarter; every=4 is four steps."""
        taken, training_loss = [], amortised.training_loss

        def spy(model, diversity, *args):
            result = training_loss(model, diversity, *args)
            value = 0.0 if result[2] is None else float(result[2].detach())
            samples = 8 if diversity.samples is None else len(diversity.samples)
            taken.append((value > 0, samples, len(diversity.num_heads)))
            return result

        monkeypatch.setattr(amortised, "training_loss", spy)
        model = DiverseViT(**SMALL)
        before = [p.clone() for p in model.parameters()]
        amortised.step_of(model, torch.rand(8, 3, 64, 32), variant)()
        assert len(taken) == (4 if "every 4" in variant else 1)
        assert sum(penalised for penalised, _, _ in taken) == (variant != ERM)
        assert taken[0][1] == (2 if "1/4" in variant else 8)
        assert taken[0][2] == (2 if variant.startswith("all") else 1)
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def test_a_step_is_its_share_of_the_period(self, small, monkeypatch):
        def interleaved(jobs, rounds, clock):
            assert clock is amortised.cpu_seconds_of
            assert list(jobs) == list(VARIANTS)
            return {name: [4.0] * rounds for name in jobs}

        monkeypatch.setattr(amortised, "interleaved", interleaved)
        found = amortised.measure_cost("small", 3)
        ratios = {name: row["ratio"] for name, row in found["rows"].items()}
        assert ratios == {name: 0.25 if "every 4" in name else 1.0 for name in VARIANTS}
        assert found["rows"]["all, every 4"]["median_ms"] == 1000.0
        assert (found["batch"], found["rounds"]) == (8, 3)

    def test_waiting_is_not_counted(self):
        assert amortised.cpu_seconds_of(lambda: time.sleep(0.2)) < 0.1
        assert amortised.cpu_seconds_of(lambda: sum(range(3_000_000))) > 0.01

    def test_the_command(self, small, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(timing, "RESULTS", tmp_path)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
        assert amortised.main(["cost", "--rounds", "2", "--batch", "4"]) == 0
        stored = json.loads((tmp_path / "amortised.json").read_text())
        assert set(stored) == {"cost"}
        rows = stored["cost"]["small"]["rows"]
        assert list(rows) == list(VARIANTS)
        assert rows[ERM]["ratio"] == 1.0
        assert stored["cost"]["small"]["batch"] == 4
        header, rule, *lines = capsys.readouterr().out.splitlines()
        assert header == "| penalty | x erm, small | seeds | ID test | OOD test |"
        assert rule.count("---") == 5
        assert lines[0] == "| erm | 1.00 |  |  |  |"
        assert len(lines) == len(VARIANTS)


def train(folder: Path, seeds: int = 2, **changes) -> list[tuple[str, dict]]:
    """Train, and return what was told after each training."""
    told: list[tuple[str, dict]] = []
    shared = {**TINY, **changes}
    amortised.train_all(shared, seeds, folder, lambda name, rows: told.append((name, dict(rows))))
    return told


class TestTraining:
    @pytest.fixture(autouse=True)
    def few(self, monkeypatch):
        monkeypatch.setattr(amortised, "VARIANTS", FEW)

    @pytest.fixture(scope="class")
    def done(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("trainings")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(amortised, "VARIANTS", FEW)
            return folder, train(folder)

    def test_seed_by_seed_and_told_at_once(self, done):
        folder, told = done
        names = ["erm-seed0", "last--every-4-seed0", "erm-seed1", "last--every-4-seed1"]
        assert [name for name, _ in told] == names
        assert [list(rows) for _, rows in told] == [[ERM], *[list(FEW)] * 3]
        assert [rows[ERM]["seeds"] for _, rows in told] == [1, 1, 2, 2]
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)

    def test_accuracies_are_those_of_the_selected_heads(self, done):
        folder, told = done
        rows = [
            row for seed in (0, 1) for row in read_csv(folder / f"erm-seed{seed}" / "metrics.csv")
        ]
        picked = []
        for seed in (0, 1):
            heads = [r for r in rows if r["seed"] == seed and r["heads"] != "all"]
            best = max((r for r in heads if r["split"] == "val_ood"), key=lambda r: r["accuracy"])
            picked += [
                r["accuracy"]
                for r in heads
                if (r["split"], r["heads"]) == ("test_ood", best["heads"])
            ]
        mean, sd = told[-1][1][ERM]["test_ood"]
        assert mean == pytest.approx(sum(picked) / 2, abs=1e-4)
        assert sd == pytest.approx(abs(picked[0] - picked[1]) / 2, abs=1e-4)

    def test_nothing_is_trained_twice(self, done, monkeypatch):
        folder, told = done
        monkeypatch.setattr(Progress, "stepped", lambda *_: pytest.fail("trains"))
        assert train(folder) == told

    def test_other_settings_are_refused(self, done):
        with pytest.raises(UsageError, match=r"^folder: expected trainings of the sett"):
            train(done[0], epochs=2)

    def test_a_cut_training_goes_on(self, done, tmp_path, monkeypatch):
        """Interrupted in the second training: the first is kept, the end is the same."""
        steps, stepped = [], Progress.stepped

        def step(self, *args):
            steps.append(args)
            stepped(self, *args)
            if len(steps) == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "stepped", step)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["erm-seed0", "last--every-4-seed0.partial"]
        assert train(tmp_path)[-1] == done[1][-1]


class TestCommand:
    @pytest.fixture(autouse=True)
    def results(self, monkeypatch, tmp_path):
        monkeypatch.setattr(timing, "RESULTS", tmp_path)
        return tmp_path / "amortised.json"

    def given(self, tmp_path, source="images.npz"):
        return ["train", "--source", source, "--folder", str(tmp_path / "runs"), "--epochs", "3"]

    def test_each_training_is_stored_and_the_cost_stays(
        self, results, tmp_path, monkeypatch, capsys
    ):
        amortised.store("cost", {"small": {"rows": {name: {"ratio": 1.5} for name in VARIANTS}}})
        accuracy = {"seeds": 2, "test_id": [0.9, 0.01], "test_ood": [0.5, 0.02]}
        stored = []

        def train_all(shared, seeds, folder, done):
            assert shared["source"] == "images.npz"
            for rows in ({ERM: accuracy}, {ERM: accuracy, "all, 1/4": accuracy}):
                done("name", rows)
                stored.append(json.loads(results.read_text()))

        monkeypatch.setattr(amortised, "train_all", train_all)
        assert amortised.main(self.given(tmp_path)) == 0
        assert [list(s["training"]["rows"]) for s in stored] == [[ERM], [ERM, "all, 1/4"]]
        assert stored[-1]["cost"]["small"]["rows"][ERM] == {"ratio": 1.5}
        recipe = stored[-1]["training"]["recipe"]
        assert (recipe["preset"], recipe["epochs"], recipe["seeds"]) == ("quick", 3, 2)
        assert "source" not in recipe
        lines = capsys.readouterr().out.splitlines()
        assert lines[2] == "| erm | 1.50 | 2 | 0.900 ± 0.010 | 0.500 ± 0.020 |"
        assert lines[3] == "| last | 1.50 |  |  |  |"

    def test_bad_input_is_one_line(self, tmp_path, capsys):
        assert amortised.main(self.given(tmp_path, str(tmp_path / "none.npz"))) == 2
        error = capsys.readouterr().err
        assert error.startswith("source: expected an .npz file")
        assert error.count("\n") == 1

    def test_an_interrupt_says_how_to_go_on(self, tmp_path, monkeypatch, capsys):
        def cut(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(amortised, "train_all", cut)
        assert amortised.main(self.given(tmp_path)) == 130
        assert capsys.readouterr().err == "interrupted; run the same command to go on\n"
