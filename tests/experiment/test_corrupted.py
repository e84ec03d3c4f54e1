"""Corruptions: of the images alone, repeatable, and what ``evaluate --corrupt`` says of three choices of heads."""

import copy
import csv
import io
import json
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("imagecorruptions")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

from diversevit_fast.data import CORRUPTIONS, corrupt, load_splits
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.corrupted import COLUMNS, evaluate_corrupted
from diversevit_fast.experiment.evaluate import evaluate
from diversevit_fast.models import DiverseViT

SIZES = {"patch_size": 16, "dim": 16, "depth": 1, "num_heads": 3, "head_dim": 8, "mlp_dim": 16}


@pytest.fixture(scope="module")
def splits():
    return load_splits("digits-photos", samples=24)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiverseViT(**SIZES).eval()


class TestCorrupt:
    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_repeatable_and_one_by_one(self, name, splits):
        """Equal seeds corrupt alike, whatever was drawn before; image i has the draws of ``seed + i``."""
        images = splits["test_id"].images[:3]
        before = images.clone()
        first = corrupt(images, name, 2, seed=5)
        assert first.shape == images.shape
        assert first.dtype == torch.uint8
        assert torch.equal(images, before)
        assert not torch.equal(first, images)
        np.random.seed(123)
        drawn = np.random.get_state()[1].copy()
        assert torch.equal(corrupt(images[1:], name, 2, seed=6), first[1:])
        assert (np.random.get_state()[1] == drawn).all()

    def test_noise_is_as_strong_as_published(self):
        """ImageNet-C's Gaussian noise: standard deviations of .08 to .38."""
        grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
        for severity, sd in ((1, 0.08), (2, 0.12), (3, 0.18)):
            noise = corrupt(grey, "gaussian_noise", severity).double() / 255
            assert float(noise.std()) == pytest.approx(sd, rel=0.03)

    def test_blur_and_brightness(self, splits):
        images = splits["test_id"].images[:4]
        blurred = corrupt(images, "defocus_blur", 5).double()
        assert blurred.diff(dim=3).abs().mean() < images.double().diff(dim=3).abs().mean() / 2
        assert corrupt(images, "brightness", 3).double().mean() > images.double().mean() + 20

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "rain", 1), "corruption: expected one"),
            ((torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fog", 0), "severity: expected 1, 2"),
            ((torch.zeros(1, 3, 32, 32), "fog", 1), "images: expected uint8"),
            (
                (torch.zeros(1, 3, 31, 64, dtype=torch.uint8), "fog", 1),
                "images: expected images of",
            ),
        ],
    )
    def test_mistakes(self, arguments, said):
        with pytest.raises(UsageError) as caught:
            corrupt(*arguments)
        assert str(caught.value).startswith(said)

    def test_a_missing_package_is_one_line(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "imagecorruptions", None)
        with pytest.raises(UsageError, match=r"imagecorruptions: .*\[corruptions\]"):
            corrupt(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "fog", 1)


class TestEvaluate:
    def test_rows(self, model, splits):
        """Each row is what evaluation of those images says of those heads."""
        found = evaluate_corrupted(
            model, splits, corruptions=("gaussian_noise", "contrast"), severities=(1, 4)
        )
        assert len(found) == 2 * 3 * (1 + 2 * 2)
        clean = [row for row in evaluate(model, splits["val_ood"], "") if row["heads"] != "all"]
        selected = max(clean, key=lambda row: row["accuracy"])["heads"]
        for row in found:
            data = copy.copy(splits[row["split"]])
            if row["severity"]:
                data.images = corrupt(data.images, row["corruption"], row["severity"])
            by_heads = {r["heads"]: r for r in evaluate(model, data, "")}
            assert row["accuracy"] == by_heads[row["heads"]]["accuracy"]
            assert row["worst_group"] == by_heads[row["heads"]]["worst_group"]
            single = [r["accuracy"] for heads, r in by_heads.items() if heads != "all"]
            wanted = {"all": row["heads"] == "all", "selected": row["heads"] == selected}
            wanted["oracle"] = row["accuracy"] == max(single) and row["heads"] != "all"
            assert wanted[row["choice"]]

    @pytest.mark.parametrize("ending", ["csv", "json"])
    def test_the_command(self, ending, model, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(
            "diversevit_fast.experiment.corrupted.evaluate_corrupted.__kwdefaults__",
            {"corruptions": ("fog",), "severities": (1, 5), "said": print},
        )
        model.save(tmp_path / "m.safetensors")
        out = tmp_path / f"rows.{ending}"
        arguments = ["evaluate", str(tmp_path / "m.safetensors"), "--samples", "16"]
        with pytest.raises(SystemExit) as exit_:
            main([*arguments, "--corrupt", "--out", str(out)])
        printed = capsys.readouterr()
        assert exit_.value.code == 0, printed
        text = out.read_text()
        rows = list(csv.DictReader(io.StringIO(text))) if ending == "csv" else json.loads(text)
        assert tuple(rows[0]) == COLUMNS
        assert len(rows) == 2 * 3 * 3
        fog = [float(r["accuracy"]) for r in rows if r["corruption"] == "fog"]
        first = sum(fog[0::6]) / 2  # all heads, test_id, both severities
        assert any(line.split()[:2] == ["fog", f"{first:.3f}"] for line in printed.out.splitlines())
        for extra, said in (
            (["--corrupt", "--out", str(out)], "out: expected a new file"),
            (["--corrupt", "--out", str(tmp_path / "rows.txt")], "out: expected a name that ends"),
            (["--out", str(tmp_path / "new.csv")], "out: expected it together with --corrupt"),
        ):
            with pytest.raises(SystemExit) as exit_:
                main([*arguments, *extra])
            assert exit_.value.code == 2
            assert capsys.readouterr().err.startswith(f"error: {said}")
