"""``predict``, and the files of weights that it, ``evaluate`` and ``select-heads`` read."""

import csv
import io
import json
import os

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("typer")

from PIL import Image
from typer.testing import CliRunner

import diversevit_fast as dvf
from diversevit_fast.data import load_splits
from diversevit_fast.experiment import metrics, resolve, run
from diversevit_fast.experiment.cli import app, main
from diversevit_fast.models import DiverseViT
from diversevit_fast.models.published import to_published_state_dict

SIZES = {
    **{"patch_size": 16, "dim": 16, "depth": 2},
    **{"num_heads": 3, "head_dim": 8, "mlp_dim": 16},
}
OPTIONS = {"samples": 32, "epochs": 2, "batch_size": 16, "threads": 1, "workers": 1}


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def predicted(*arguments: object) -> list[dict]:
    return json.loads(call("predict", *arguments, "--json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one training."""
    settings = resolve({**OPTIONS, "model": SIZES, "seeds": (0,), "methods": ("erm",)})
    return run(settings, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def weights(finished):
    return finished / "erm-seed0.safetensors"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images of the data, one in a folder below; and their tensors, in order of names."""
    folder = tmp_path_factory.mktemp("pictures")
    tensors = load_splits("digits-photos", samples=32)["test_id"].images[:5]
    (folder / "z").mkdir()
    for i, tensor in enumerate(tensors):
        name = folder / ("z" if i == 4 else "") / f"{i}.png"
        Image.fromarray(tensor.permute(1, 2, 0).numpy()).save(name)
    (folder / "notes.txt").write_text("no image")
    return folder, tensors.float() / 255


class TestPredict:
    def test_all_heads_are_the_model_itself(self, weights, pictures):
        folder, tensors = pictures
        wanted = DiverseViT.load(weights)(tensors).softmax(-1)
        found = predicted(weights, folder)
        assert [one["image"] for one in found] == [
            str(folder / name) for name in ("0.png", "1.png", "2.png", "3.png", "z/4.png")
        ]
        assert [one["label"] for one in found] == wanted.argmax(-1).tolist()
        chances = torch.tensor([list(one["probabilities"].values()) for one in found])
        assert torch.allclose(chances, wanted)
        assert [one["probability"] for one in found] == [
            max(one["probabilities"].values()) for one in found
        ]
        assert {tuple(one["heads"]) for one in found} == {(0, 1, 2)}

    def test_some_heads_are_those_of_keep_heads(self, weights, pictures):
        folder, tensors = pictures
        model = DiverseViT.load(weights)
        with dvf.keep_heads(model, {-1: [0, 2]}):
            wanted = model(tensors).softmax(-1).amax(-1)
        found = predicted(weights, folder, "--heads", "2,0")
        assert torch.allclose(torch.tensor([one["probability"] for one in found]), wanted)
        assert found[0]["heads"] == [0, 2]
        assert not torch.allclose(wanted, model(tensors).softmax(-1).amax(-1))

    def test_the_selected_head_is_the_run_s(self, finished, weights, pictures):
        rows = metrics.read_csv(finished / "metrics.csv")
        head = int(metrics.SELECTED.pick(rows)["heads"])
        found = predicted(weights, pictures[0], "--heads", "selected")
        assert found == predicted(weights, pictures[0], "--heads", head)

    def test_classes_have_the_names_of_the_data(self, weights, pictures):
        found = predicted(weights, pictures[0])
        names = load_splits("digits-photos", samples=32)["train"].class_names
        assert [one["class"] for one in found] == [names[one["label"]] for one in found]
        assert tuple(found[0]["probabilities"]) == names

    def test_classes_without_a_run_are_numbers(self, weights, pictures, tmp_path):
        alone = tmp_path / "alone.safetensors"
        alone.write_bytes(weights.read_bytes())
        assert {one["class"] for one in predicted(alone, pictures[0])} <= {"0", "1"}

    def test_csv_and_table_say_the_same(self, weights, pictures):
        folder, _ = pictures
        found = predicted(weights, folder, "--heads", 1)
        rows = list(
            csv.DictReader(io.StringIO(call("predict", weights, folder, "--csv", "--heads", 1)))
        )
        assert [row["image"] for row in rows] == [one["image"] for one in found]
        assert [float(row["probability"]) for row in rows] == pytest.approx(
            [one["probability"] for one in found]
        )
        assert {row["heads"] for row in rows} == {"1"}
        lines = call("predict", weights, folder, "--heads", 1).splitlines()
        assert [line.split()[-1] for line in lines[:-1]] == [one["image"] for one in found]
        assert lines[-1] == "heads of the last layer: 1"

    def test_other_sizes_and_kinds_are_resized_and_said(self, weights, tmp_path):
        flat = np.full((128, 64, 3), 90, np.uint8)
        Image.fromarray(flat).save(tmp_path / "large.png")
        Image.fromarray(flat[:, :, 0]).save(tmp_path / "grey.png")
        Image.fromarray(flat[:64, :32]).save(tmp_path / "right.bmp")
        result = CliRunner().invoke(app, ["predict", str(weights), str(tmp_path), "--json"])
        assert "2 of 3 images resized to 64 x 32 pixels (height x width)" in result.stderr
        assert len({one["probability"] for one in json.loads(result.stdout)}) == 1

    def test_more_images_than_a_batch_keep_their_order(self, weights, pictures, monkeypatch):
        whole = predicted(weights, pictures[0])
        monkeypatch.setattr("diversevit_fast.experiment.predict._BATCH", 2)
        for one, other in zip(whole, predicted(weights, pictures[0]), strict=True):
            assert one["image"] == other["image"]
            assert one["probability"] == pytest.approx(other["probability"], rel=1e-5)


class TestFilesOfWeights:
    """Whatever holds the same model predicts, evaluates and selects the same."""

    @pytest.fixture
    def published(self, weights, tmp_path):
        path = tmp_path / "published.pth"
        torch.save(to_published_state_dict(DiverseViT.load(weights)), path)
        return path

    def test_published(self, weights, published, pictures):
        wanted = predicted(weights, pictures[0])
        found = predicted(published, pictures[0], "--num-heads", 3)
        assert [one["probability"] for one in found] == [one["probability"] for one in wanted]
        wrong = predicted(published, pictures[0], "--num-heads", 1)
        assert [one["probability"] for one in wrong] != [one["probability"] for one in wanted]

    def test_published_is_evaluated_and_selected_from(self, weights, published, tmp_path):
        data = ("--samples", 32, "--num-heads", 3)
        wanted = call("evaluate", weights).splitlines()[1:]
        assert call("evaluate", published, *data).splitlines()[1:] == wanted
        small = tmp_path / "small.safetensors"
        call("select-heads", published, *data, "--save", small)
        assert len(DiverseViT.load(small).kept_heads[1]) == 1

    @pytest.mark.parametrize("by", ["select-heads", "save_pruned"])
    def test_pruned(self, by, weights, pictures, finished, tmp_path):
        small = tmp_path / "small.safetensors"
        if by == "select-heads":
            call("select-heads", weights, "--save", small)
            config = ()
            kept = list(DiverseViT.load(small).kept_heads[1])
        else:
            kept = [1, 2]
            dvf.save_pruned(dvf.prune_heads(DiverseViT.load(weights), {1: kept}), small)
            config = ("--config", finished / "config.json")
        heads = ("--heads", ",".join(map(str, kept)))
        wanted = predicted(weights, pictures[0], *heads)
        for options in ((), heads):
            found = predicted(small, pictures[0], *options, *config)
            for one, other in zip(found, wanted, strict=True):
                assert one["probability"] == pytest.approx(other["probability"], rel=1e-5)
                assert one["heads"] == kept
        printed = call("evaluate", small, "--config", finished / "config.json").splitlines()
        assert len(printed) == 4 + len(kept)  # title, header, all, each head, legend
        call("select-heads", small, "--config", finished / "config.json")

    def test_heads_of_a_pruned_model_keep_their_numbers(self, weights, pictures, tmp_path):
        small = tmp_path / "small.safetensors"
        model = DiverseViT.load(weights)
        dvf.prune_heads(model, {1: [0, 2]}, rescale=False)
        model.save(small)
        wanted = predicted(weights, pictures[0], "--heads", 2)
        with dvf.keep_heads(model, {1: [1]}):
            chances = model(pictures[1]).softmax(-1).amax(-1).tolist()
        found = predicted(small, pictures[0], "--heads", 2)
        assert [one["probability"] for one in found] == pytest.approx(chances)
        assert [one["heads"] for one in found] == [one["heads"] for one in wanted]


MISTAKES = {
    "no image": (["{weights}", "{tmp}/none.png"], "images: expected files or folders, got no"),
    "empty folder": (["{weights}", "{tmp}/empty"], "in the folder"),
    "a text": (["{weights}", "{tmp}/text.png"], "text.png (no image that Pillow knows); restore"),
    "cut off": (["{weights}", "{tmp}/cut.png"], "cut.png ("),
    "deep": (["{weights}", "{tmp}/deep.png"], "deep.png (more than 8 bits a channel)"),
    "a pipe": (["{weights}", "{tmp}/pipe.png"], "pipe.png (a device or a pipe)"),
    "no head": (["{weights}", "{tmp}/good.png", "--heads", "3"], "numbers among 0, 1, 2, got '3'"),
    "no number": (
        ["{weights}", "{tmp}/good.png", "--heads", "best"],
        "heads: expected selected, or",
    ),
    "twice": (["{weights}", "{tmp}/good.png", "--heads", "1,1"], "heads: expected selected, or"),
    "selected of last": (
        ["{run}/erm-seed0-last.safetensors", "{tmp}/good.png", "--heads", "selected"],
        "heads: expected numbers for weights that are not those of a run's selected epoch",
    ),
    "json and csv": (["{weights}", "{tmp}/good.png", "--json", "--csv"], "csv: expected"),
    "sizes it holds": (
        ["{weights}", "{tmp}/good.png", "--num-heads", "3"],
        "expected no sizes for a file that holds its own",
    ),
    "no sizes": (
        ["{tmp}/a.pth", "{tmp}/good.png", "--image-size", "64x32"],
        "image_size: expected",
    ),
    "no weights": (["{tmp}/a.pth", "{tmp}/good.png"], "a.pth"),
    "pruned alone": (["{tmp}/pruned.safetensors", "{tmp}/good.png"], "a config.json beside it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, weights, finished, tmp_path, capsys):
    good = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 32, 3), np.uint8))
    good.save(tmp_path / "good.png")
    Image.fromarray(np.zeros((64, 32), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    if name == "pruned alone":
        model = dvf.prune_heads(DiverseViT.load(weights), {1: [1]})
        dvf.save_pruned(model, tmp_path / "pruned.safetensors")
    arguments, said = MISTAKES[name]
    with pytest.raises(SystemExit) as end:
        main(
            ["predict", *(a.format(tmp=tmp_path, weights=weights, run=finished) for a in arguments)]
        )
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err
