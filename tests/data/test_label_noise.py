"""``label_noise``: a fraction of the training labels is wrong, and nothing else changes."""

import json

import pytest
import torch

pytest.importorskip("sklearn")

from diversevit_fast.data import SPLITS, load_splits
from diversevit_fast.data.label_noise import noisy_labels
from diversevit_fast.errors import UsageError


def test_only_training_labels_are_wrong_and_about_so_many():
    clean = load_splits("digits-photos")
    noisy = load_splits("digits-photos", label_noise=0.1)
    for name in SPLITS:
        assert torch.equal(clean[name].images, noisy[name].images)
        assert torch.equal(clean[name].groups, noisy[name].groups)
        assert torch.equal(clean[name].labels, noisy[name].labels) == (name != "train")
    wrong = (clean["train"].labels != noisy["train"].labels).double().mean().item()
    assert wrong == pytest.approx(0.1, abs=0.03)  # five standard errors of 3000 images


def test_the_same_labels_for_the_same_seed_alone():
    def labels(seed):
        clean = load_splits("digits-photos", seed=seed, samples=160)["train"].labels
        return load_splits("digits-photos", seed=seed, samples=160, label_noise=0.5)[
            "train"
        ].labels.sub(clean)

    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0).abs(), labels(1).abs())


@pytest.mark.parametrize("nothing", [None, 0, 0.0])
def test_no_noise(nothing):
    clean = load_splits("digits-photos", samples=160)["train"].labels
    assert torch.equal(
        load_splits("digits-photos", samples=160, label_noise=nothing)["train"].labels, clean
    )


def test_another_class_and_every_other_one():
    labels = torch.arange(4).repeat(100)
    found = noisy_labels(labels, 1.0, 4, torch.Generator().manual_seed(0))
    assert (found != labels).all()
    assert all(set(found[labels == i].tolist()) == {0, 1, 2, 3} - {i} for i in range(4))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "much", True])
def test_mistakes(value):
    with pytest.raises(UsageError, match=r"^label_noise: expected a number from 0 to 1, got "):
        load_splits("digits-photos", label_noise=value)


def test_a_folder_too(tmp_path):
    from PIL import Image

    rows = ["filename,split,y,a"]
    for i in range(96):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{('train', 'val', 'test')[i % 3]},{i // 3 % 2},{i // 6 % 2}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    clean = load_splits("folder", source=tmp_path)
    noisy = load_splits("folder", source=tmp_path, label_noise=1.0)
    assert torch.equal(noisy["train"].labels, 1 - clean["train"].labels)
    assert torch.equal(noisy["val_id"].labels, clean["val_id"].labels)


def test_a_run_trains_with_them_and_says_so(tmp_path):
    pytest.importorskip("typer")
    from diversevit_fast.experiment.cli import main
    from diversevit_fast.experiment.run import fingerprint

    model = {"patch_size": 16, "depth": 1, "dim": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 16}
    settings = {"epochs": 1, "samples": 64, "threads": 1, "workers": 1, "model": model}
    (tmp_path / "small.json").write_text(json.dumps(settings))
    words = f"train erm --config {tmp_path}/small.json --label-noise 0.25 --out {tmp_path}/run"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 0
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["settings"]["label_noise"] == 0.25
    noisy = load_splits("digits-photos", samples=64, label_noise=0.25)
    assert record["splits"] == {name: fingerprint(split) for name, split in noisy.items()}
