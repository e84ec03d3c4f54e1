"""Image folders on the command line: trained on, evaluated and selected like any other data set."""

import csv
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from PIL import Image

from diversevit_fast.data import SPLITS, load_splits, waterbirds
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment.cli import main
from diversevit_fast.models import DiverseViT

from ..helpers.group_folders import PER_GROUP, make_group_folder, pixels_of

SIZES = {"patch_size": 8, "dim": 16, "depth": 2, "num_heads": 3, "head_dim": 8, "mlp_dim": 16}
TINY = {"epochs": 1, "batch_size": 32, "threads": 1, "workers": 1, "seeds": [0], "model": SIZES}


def call(capsys, *arguments: object, code: int = 0) -> str:
    """What a command that must exit with ``code`` prints."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert exit_.value.code == code, printed
    return printed.out if code == 0 else printed.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_group_folder(tmp_path_factory.mktemp("own") / "birds")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def finished(folder, config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    source = ["--data", "folder", "--source", str(folder), "--img-size", "24"]
    with pytest.raises(SystemExit) as exit_:
        main(["run", *source, "--config", str(config), "--out", str(out)])
    assert exit_.value.code == 0
    return out


class TestLoadSplits:
    def test_the_five_splits_are_waterbirds(self, folder):
        """Same images in the same splits; every pixel is that of its file."""
        splits = load_splits("folder", source=folder)
        wanted = waterbirds(folder)
        assert tuple(splits) == SPLITS
        for name, split in splits.items():
            assert split.images.shape == (len(wanted[name]), 3, 16, 16)
            assert split.images.dtype == torch.uint8
            assert torch.equal(split.groups, wanted[name].groups)
            assert split.group_names == wanted[name].group_names
            for i in range(len(split)):
                image, label, group = wanted[name][i]
                assert tuple(split.images[i, :, 3, 5].tolist()) == image.getpixel((5, 3))
                assert split[i][1:] == (label, group)
                assert torch.equal(split[i][0], split.images[i] / 255)

    def test_images_are_resized_not_transposed(self, tmp_path):
        """An image that is red on its left and green on its lower half stays so, at any size."""
        folder = make_group_folder(tmp_path / "wide", size=(20, 10))
        for path in folder.glob("*.png"):
            image = Image.new("RGB", (20, 10))
            image.paste((200, 0, 0), (0, 0, 10, 10))
            image.paste((0, 100, 0), (0, 5, 20, 10))
            image.save(path)
        plain = load_splits("folder", source=folder)["test_id"]
        assert plain.image_size == (10, 20)
        assert plain.images[0, :, 2, 4].tolist() == [200, 0, 0]
        assert plain.images[0, :, 7, 14].tolist() == [0, 100, 0]
        assert plain.images[0, :, 2, 14].tolist() == [0, 0, 0]
        square = load_splits("folder", source=folder, img_size=40)["test_id"]
        assert square.image_size == (40, 40)
        assert square.images[0, :, 8, 8].tolist() == [200, 0, 0]
        assert square.images[0, :, 32, 32].tolist() == [0, 100, 0]
        assert square.images[0, :, 8, 32].tolist() == [0, 0, 0]

    def test_samples_keep_the_proportions_of_groups(self, folder):
        splits = load_splits("folder", source=folder, samples={"train": 36, "test_ood": 10})
        whole = load_splits("folder", source=folder)
        assert len(splits["train"]) == 36  # of 27, 9, 9, 27
        assert splits["train"].groups.bincount().tolist() == [14, 5, 4, 13]
        assert splits["test_ood"].groups.bincount().tolist() == [3, 3, 2, 2]
        assert len(splits["val_ood"]) == len(whole["val_ood"])
        again = load_splits("folder", source=folder, samples={"train": 36, "test_ood": 10})
        other = load_splits("folder", source=folder, samples={"test_ood": 10}, seed=1)
        assert torch.equal(again["test_ood"].images, splits["test_ood"].images)
        assert not torch.equal(other["test_ood"].images, splits["test_ood"].images)

    def test_a_csv_file_by_name(self, folder, tmp_path):
        text = (folder / "metadata.csv").read_text()
        (tmp_path / "swapped.csv").write_text(text.replace(",y,a", ",a,y"))
        splits = load_splits("folder", source=folder, metadata=tmp_path / "swapped.csv")
        red, green, _ = splits["val_ood"].images[0, :, 0, 0].tolist()
        label, attribute = splits["val_ood"].labels[0], splits["val_ood"].attributes[0]
        assert (red, green) == pixels_of(int(attribute), int(label), 0)[:2]

    def test_any_data_set_is_resized(self):
        pytest.importorskip("sklearn")
        plain = load_splits("digits-photos", samples=8)["val_id"]
        small = load_splits("digits-photos", samples=8, img_size=16)["val_id"]
        assert small.image_size == (16, 16) == tuple(small.images.shape[2:])
        means = plain.images.float().view(8, 3, 16, 4, 16, 2).mean((3, 5))
        assert (small.images.float() - means).abs().mean() < 20  # 57 for another image's

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"source": None}, "source: expected a folder of images"),
            ({"source": "nowhere"}, "root: expected metadata.csv in one of"),
            ({"metadata": "none.csv"}, "metadata: expected a CSV file"),
            ({"img_size": 0}, "img_size: expected a whole number"),
            ({"img_size": True}, "img_size: expected a whole number"),
            ({"correlation": 0.9}, "correlation: expected nothing for folder"),
            ({"download": True}, "download: expected nothing for folder"),
            ({"samples": 64}, "samples: expected from 1 to 8 for val_id, got 64"),
            ({"name": "digits-photos", "source": None, "metadata": "a"}, "metadata: expected noth"),
        ],
    )
    def test_mistakes(self, options, said, folder):
        with pytest.raises(UsageError) as caught:
            load_splits(**{"name": "folder", "source": folder, **options})
        assert str(caught.value).startswith(said)

    def test_too_large_for_the_memory(self, folder, monkeypatch):
        monkeypatch.setattr("os.sysconf", lambda name: 1000)  # a MB in all
        with pytest.raises(UsageError, match=r"img_size: expected images that fit the memory"):
            load_splits("folder", source=folder, img_size=64)


class TestCommands:
    def test_run(self, finished, folder):
        record = json.loads((finished / "config.json").read_text())
        splits = load_splits("folder", source=folder, img_size=24)
        for name, split in splits.items():
            counts = split.groups.bincount(minlength=4).tolist()
            assert list(record["splits"][name]["groups"].values()) == counts
        assert record["settings"]["img_size"] == 24
        model = DiverseViT.load(finished / "erm-seed0.safetensors")
        assert model.config["image_size"] == (24, 24)

    def test_evaluate_and_select(self, finished, capsys):
        """The folder of the run says which data; its numbers come out again."""
        weights = finished / "diversevit-seed0-last.safetensors"
        printed = call(capsys, "evaluate", weights)
        with (finished / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["method"] == "diversevit"]
        for row in rows:
            if row["split"] != "train":
                assert f"{float(row['accuracy']):.3f}" in printed
        assert "selected" in call(capsys, "select-heads", weights)

    def test_other_data_by_options(self, finished, folder, capsys):
        weights = finished / "erm-seed0.safetensors"
        same = ("evaluate", weights, "--data", "folder", "--source", folder)
        table = call(capsys, *same, "--img-size", 24).split("\n", 1)[1]
        assert table == call(capsys, "evaluate", weights).split("\n", 1)[1]
        said = call(capsys, *same, code=2)
        assert said.startswith("error: data: expected images [3, 24, 24]")

    def test_the_size_in_memory_is_said(self, folder, config, tmp_path, capsys):
        printed = call(
            capsys,
            *("run", "--data", "folder", "--source", folder, "--config", config),
            *("--out", tmp_path / "out"),
        )
        count = sum(sum(counts) for counts in PER_GROUP.values()) + 16 + 5 + 5 + 16
        assert f"data: {count} images of 16 x 16 pixels, {count * 768 / 1e6:.3g} MB" in printed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def rewrite(folder: Path, change) -> None:
    """Apply ``change`` to each row (a dictionary); None drops it."""
    with (folder / "metadata.csv").open(newline="") as file:
        rows = [changed for row in csv.DictReader(file) if (changed := change(row))]
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


DAMAGES = {
    "truncated": (lambda f: cut(f / "0003.png"), "0003.png (", "images that can be decoded"),
    "gone": (lambda f: (f / "0003.png").unlink(), "1 missing, the first", "0003.png"),
    "sizes": (
        lambda f: Image.new("RGB", (9, 9)).save(f / "0003.png"),
        "img_size: expected a number, as images differ in size",
        "(--img-size)",
    ),
    "bits": (
        lambda f: Image.new("I;16", (16, 16)).save(f / "0003.png"),
        "images of 8 bits a channel, got",
        "0003.png of mode I;16",
    ),
    "no column": (
        lambda f: rewrite(f, lambda r: {k: r[k] for k in r if k != "y"}),
        "metadata: expected a column y",
        "id, filename, split, a",
    ),
    "no validation": (
        lambda f: rewrite(f, lambda r: None if r["split"] == "val" else r),
        "split: expected one of",
        "got val",
    ),
    "one attribute": (
        lambda f: rewrite(f, lambda r: {**r, "a": "0"}),
        "a: expected at least two different values",
        "0 in every row",
    ),
    "a label of tests alone": (
        lambda f: rewrite(f, lambda r: {**r, "y": "2"} if r["split"] == "test" else r),
        "train: expected images of every label, got none with label 2",
        "without gaps",
    ),
    "a group without tests": (
        lambda f: rewrite(
            f, lambda r: None if (r["split"], r["y"], r["a"]) == ("test", "1", "0") else r
        ),
        "test: expected images of every group that the training set has",
        "none of y=1, a=0",
    ),
    "few": (
        lambda f: rewrite(f, lambda r: r if r["split"] != "train" or int(r["id"]) < 12 else None),
        "root: expected enough images for val_id",
        "larger",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_data_are_one_line_and_leave_nothing(name, config, tmp_path, capsys):
    damage, *said = DAMAGES[name]
    folder = make_group_folder(tmp_path / "birds")
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    source = ("--data", "folder", "--source", folder)
    printed = call(capsys, "run", *source, "--config", config, "--out", tmp_path / "o", code=2)
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    for part in said:
        assert part in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_colours_of_every_mode(tmp_path):
    """Grey, palette, transparent and CMYK images become RGB."""
    folder = make_group_folder(tmp_path / "birds")
    for number, mode in enumerate(("L", "LA", "P", "RGBA", "1", "CMYK")):
        image = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
        image.save(folder / f"{number:04}.png", format="TIFF" if mode == "CMYK" else "PNG")
    seen = torch.cat([s.images[:, :, 0, 0] for s in load_splits("folder", source=folder).values()])
    assert (seen == 255).all(1).sum() >= 6
