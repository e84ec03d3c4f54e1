"""Runs with timm models: whole and with a frozen trunk, to weight files, evaluated and selected again."""

import io
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.data import batches, load_splits
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import frozen_trunk, metrics, resolve, resume, run
from diversevit_fast.experiment import train as training
from diversevit_fast.experiment.checkpoint import Task, _identity, _is_identity
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.config import Settings
from diversevit_fast.experiment.evaluate import evaluate
from diversevit_fast.experiment.frozen_trunk import inputs_of, token_folder
from diversevit_fast.experiment.model_files import load_model as load
from diversevit_fast.experiment.models import TimmModel, architecture_of, described
from diversevit_fast.experiment.run import Interrupted, fingerprint
from diversevit_fast.files import FileError
from diversevit_fast.models import DiverseViT, TimmClassifier, timm_last_block
from tests.experiment.test_experiment import contents as contents_of_diverse_vits
from tests.experiment.test_experiment import interrupt_after

timm = pytest.importorskip("timm")
rich_console = pytest.importorskip("rich.console")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = {"samples": 32, "epochs": 2, "batch_size": 16, "seeds": (0,), "threads": 1, "workers": 1}
TINY |= {"architecture": "timm:test_vit", "img_size": 32, "lr": 1e-3, "erm_lr": 1e-3}
HEADS = ("all", "0", "1")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A folder of tokens of the tests' own; compiled kernels stay where they are."""
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_trunk, "token_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights for squares of 160 pixels, as timm's own; the runs resize their positions."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "test_vit.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def splits():
    return load_splits("digits-photos", samples=32, img_size=32)


@pytest.fixture(scope="module")
def prints(splits):
    return {name: fingerprint(data) for name, data in splits.items()}


def quiet():
    return rich_console.Console(file=io.StringIO())


def call(*arguments: str, code: int = 0) -> None:
    """Run a command that must exit with ``code``."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == code


def settings(**changes) -> Settings:
    return resolve({**TINY, **changes})


def frozen(weights: Path, **changes) -> Settings:
    return settings(pretrained=str(weights), freeze_below="last", **changes)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "frozen"
    return run(frozen(weights), out, console=quiet())


def contents(folder: Path) -> dict[str, object]:
    """What a run must repeat: weights bit for bit, metrics without the timing columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiverseViT, "load", TimmClassifier.load)
        return contents_of_diverse_vits(folder)


class TestRun:
    def test_frozen_run_writes_whole_models(self, finished, weights):
        state = torch.load(weights, weights_only=True)
        changed = set()
        for method in ("erm", "diversevit"):
            model = load(str(finished / f"{method}-seed0.safetensors"))
            assert isinstance(model, TimmClassifier)
            found = model.model.state_dict()
            assert model.input_size == (32, 32)
            changed |= {k for k in state if k not in found or not torch.equal(found[k], state[k])}
        trained = {name.split(".")[0] for name in changed if not name.startswith("blocks.")}
        assert trained == {"pos_embed", "norm", "head"}  # positions are resized, not trained
        assert {name[:8] for name in changed if name.startswith("blocks.")} == {"blocks.5"}

    def test_rows_are_those_of_the_whole_model(self, finished, splits):
        """Evaluated from tokens in float16 there, from images here."""
        rows = metrics.read_csv(finished / "metrics.csv")
        model = load(str(finished / "diversevit-seed0-last.safetensors"))
        for split in metrics.EVALUATED:
            again = {row["heads"]: row for row in evaluate(model, splits[split], split)}
            known = [
                row
                for row in rows
                if (row["method"], row["epoch"], row["split"]) == ("diversevit", 2, split)
            ]
            assert [row["heads"] for row in known] == list(HEADS)
            for row in known:
                assert row["loss"] == pytest.approx(again[row["heads"]]["loss"], rel=1e-3)

    def test_page_and_record_name_backbone_and_pretraining(self, finished):
        said = "timm test_vit, images of 32 x 32 pixels; pretraining: weights of test_vit.pth"
        assert said in (finished / "report.html").read_text()
        record = json.loads((finished / "config.json").read_text())["model"]
        assert (record["backbone"], record["pretraining"]) == (
            "timm test_vit",
            "weights of test_vit.pth",
        )
        assert len(record["sha256"]) == 64
        assert described(Settings()) == "DiverseViT, published configuration; pretraining: random"

    def test_interrupted_run_continues_to_the_same_bits(
        self, finished, weights, tmp_path, monkeypatch
    ):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1, 0)
            with pytest.raises(Interrupted):
                run(frozen(weights), tmp_path / "out", console=quiet())
        assert contents(resume(tmp_path / "out", console=quiet())) == contents(finished)

    def test_changed_weights_are_refused_by_resume(self, weights, tmp_path, monkeypatch):
        mine = tmp_path / "mine.pth"
        mine.write_bytes(weights.read_bytes())
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1, 0)
            with pytest.raises(Interrupted):
                run(settings(pretrained=str(mine)), tmp_path / "out", console=quiet())
        torch.manual_seed(6)
        torch.save(timm.create_model("test_vit").state_dict(), mine)
        with pytest.raises(UsageError, match="pretrained: expected the weights that"):
            resume(tmp_path / "out", console=quiet())

    def test_whole_model_of_random_weights_in_a_worker(self, tmp_path):
        """Every block is trained; a process of its own writes the same files."""
        chosen = settings(epochs=1, methods=("erm", "diversevit"))
        one = run(chosen, tmp_path / "one", console=quiet())
        two = run(replace(chosen, workers=2), tmp_path / "two", console=quiet())
        assert contents(one) == contents(two)
        model = load(str(one / "diversevit-seed0-last.safetensors"))
        assert model.config["pretraining"] == "random"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fresh = TimmClassifier("test_vit", (32, 32), 2, 32)
        same = {
            name
            for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True)
            if torch.equal(a, b)
        }
        assert not same

    def test_weights_are_evaluated_selected_and_pruned(self, finished, tmp_path, capsys):
        file, config = finished / "erm-seed0.safetensors", finished / "config.json"
        call("evaluate", str(file))
        shown = capsys.readouterr().out
        assert [line.split()[0] for line in shown.splitlines()[2:5]] == list(HEADS)
        pruned = tmp_path / "pruned.safetensors"
        arguments = ["select-heads", str(file), "--search", "exhaustive", "--save", str(pruned)]
        call(*arguments)
        assert "selected: " in capsys.readouterr().out
        call("evaluate", str(pruned), "--config", str(config))
        assert load(str(pruned)).model.blocks[-1].attn.num_heads <= 2
        assert list(load(str(pruned)).kept_heads) == [0, 1, 2, 3, 4, 5]

    def test_images_in_files_are_predicted(self, finished, tmp_path, capsys):
        images = pytest.importorskip("PIL.Image")
        images.new("RGB", (40, 40), (10, 200, 30)).save(tmp_path / "green.png")
        file = str(finished / "erm-seed0.safetensors")
        for heads in ([], ["--heads", "selected"], ["--heads", "1"]):
            call("predict", file, str(tmp_path), "--json", *heads)
            (found,) = json.loads(capsys.readouterr().out)
            model, kept = load(file), found["heads"]
            green = torch.tensor([10, 200, 30]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 255
            with torch.no_grad(), dvf.keep_heads(model, {-1: kept}):
                wanted = model(green).softmax(-1).flatten().tolist()
            assert list(found["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)


class TestFrozenTrunk:
    def test_training_from_tokens_is_training_with_a_frozen_trunk(self, weights, splits):
        chosen = frozen(weights)
        kind = architecture_of(chosen, splits["train"])
        assert isinstance(kind, TimmModel)
        torch.manual_seed(0)
        part = kind.build()
        torch.manual_seed(0)
        whole = kind.whole().train()
        names = timm_last_block.whole_names(whole.model, part.state_dict())
        for name, parameter in whole.model.named_parameters():
            parameter.requires_grad_(name in names)
        with torch.no_grad():
            assert all(torch.equal(whole.model.state_dict()[k], x) for k, x in names.items())
        found = []
        for model in (part, whole):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
            diversity = dvf.HeadDiversity(model)
            for images, labels, _ in batches(splits["train"], 8):
                inputs = images
                if model is part:
                    with torch.no_grad():
                        inputs = timm_last_block.tokens(whole.model, whole.prepare(images))
                _, loss, penalty = training.training_loss(model, diversity, inputs, labels, 10.0)
                optimizer.zero_grad()
                (loss + 10.0 * penalty).backward()
                optimizer.step()
            found.append([p.detach().clone() for p in trained])
        start = [x for name, x in kind.build().named_parameters() if "head" not in name]
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        assert any(
            not torch.allclose(a, b, atol=1e-3) for a, b in zip(found[0], start, strict=False)
        )

    def test_tokens_are_kept_for_the_next_run(self, weights, splits, prints):
        notes, device = [], torch.device("cpu")
        chosen = frozen(weights, img_size=None)
        first = inputs_of(chosen, splits, prints, device, notes.append)
        assert [line for line in notes if "160 images" in line] == notes
        assert len(notes) == 1
        again = inputs_of(chosen, splits, prints, device, notes.append)
        assert len(notes) == 1
        whole = TimmModel(chosen, (32, 32), 2).whole().eval()
        assert whole.input_size == (160, 160)
        for name, split in splits.items():
            assert torch.equal(first[name].images, again[name].images)
            images = split.images.float() / 255
            with torch.no_grad():
                tokens = timm_last_block.tokens(whole.model, whole.prepare(images))
            assert torch.allclose(first[name].images.float(), tokens, rtol=2e-3, atol=1e-3)
            pairs = zip(batches(first[name], 7), batches(split, 7), strict=True)
            for (taken, labels, groups), (_, wanted, members) in pairs:
                assert taken.dtype == torch.float32
                assert torch.equal(labels, wanted)
                assert torch.equal(groups, members)

    @pytest.mark.parametrize("other", ["weights", "size", "images"])
    def test_other_inputs_have_other_tokens(self, other, weights, splits, prints, tmp_path, cache):
        notes, device = [], torch.device("cpu")
        chosen = frozen(weights)
        inputs_of(chosen, splits, prints, device, lambda line: None)
        files = set(cache.iterdir())
        match other:
            case "weights":
                torch.manual_seed(7)
                torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "test_vit.pth")
                chosen = frozen(tmp_path / "test_vit.pth")
            case "size":
                chosen = frozen(weights, img_size=48)
                splits = load_splits("digits-photos", samples=32, img_size=48)
                prints = {name: fingerprint(data) for name, data in splits.items()}
            case "images":
                splits = load_splits("digits-photos", samples=32, img_size=32, seed=1)
                prints = {name: fingerprint(data) for name, data in splits.items()}
        inputs_of(chosen, splits, prints, device, notes.append)
        assert len(notes) == 1
        assert len(set(cache.iterdir()) - files) == 5

    def test_a_full_disk_is_one_line_and_leaves_nothing(
        self, weights, splits, prints, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(frozen_trunk, "token_folder", lambda: tmp_path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes of a file
        try:
            with pytest.raises(FileError) as error:
                inputs_of(frozen(weights), splits, prints, torch.device("cpu"), lambda line: None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value)
        assert not list(tmp_path.iterdir())

    def test_a_damaged_file_is_one_line(self, weights, splits, prints, tmp_path, monkeypatch):
        monkeypatch.setattr(frozen_trunk, "token_folder", lambda: tmp_path)
        arguments = frozen(weights), splits, prints, torch.device("cpu"), lambda line: None
        inputs_of(*arguments)
        path = next(iter(tmp_path.iterdir()))
        for damage in (b"", b"nothing", path.read_bytes()[:300]):
            path.write_bytes(damage)
            with pytest.raises(UsageError, match="a damaged file; delete it"):
                inputs_of(*arguments)

    def test_tokens_beyond_float16_are_refused(self, splits, prints, tmp_path):
        torch.manual_seed(5)
        model = timm.create_model("test_vit")
        torch.nn.init.constant_(model.blocks[0].mlp.fc2.bias, 1e6)
        torch.save(model.state_dict(), tmp_path / "huge.pth")
        chosen = frozen(tmp_path / "huge.pth")
        with pytest.raises(UsageError, match="tokens that float16 holds"):
            inputs_of(chosen, splits, prints, torch.device("cpu"), lambda line: None)

    def test_the_cache_folder_is_that_of_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DIVERSEVIT_CACHE_DIR", str(tmp_path / "a" / "b"))
        assert token_folder() == tmp_path / "a" / "b" / "tokens"
        assert token_folder().is_dir()
        monkeypatch.delenv("DIVERSEVIT_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert token_folder() == tmp_path / "diversevit" / "tokens"
        monkeypatch.setenv("DIVERSEVIT_CACHE_DIR", "here")
        with pytest.raises(
            UsageError, match=r"cache folder: expected one .* expected an absolute path"
        ):
            token_folder()


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"architecture": "timm:"}, "architecture: expected diversevit, or timm:"),
            ({"architecture": "vit"}, "architecture: expected diversevit, or timm:"),
            ({"model": {"depth": 2}}, "model: expected none for timm:test_vit"),
            ({"freeze_below": "first"}, "freeze_below: expected last"),
            ({"freeze_below": "last"}, "freeze_below: expected pretrained weights"),
            (
                {"freeze_below": "last", "pretrained": "x.pth", "layers": "all"},
                "layers: expected last with freeze_below",
            ),
            ({"img_size": 0}, "img_size: expected a whole number of pixels"),
            (
                {"architecture": "diversevit", "freeze_below": "last"},
                "freeze_below: expected none for DiverseViT",
            ),
        ],
    )
    def test_refuses(self, changes, said):
        with pytest.raises(UsageError, match=said) as error:
            settings(**changes)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--model", "timm:resnet18"], "model: expected a vision transformer"),
            (["--model", "timm:test_vit", "--img-size", "50"], "img_size: expected a multiple"),
            (["--model", "timm:test_vit", "--weights", "no.pth"], "no.pth"),
            (["--weights", "no.pth"], "no.pth"),
            (["--freeze-below", "last"], "say --model timm:NAME"),
        ],
    )
    def test_command_line_refuses_and_leaves_nothing(self, options, said, tmp_path, capsys):
        out = tmp_path / "out"
        call("run", "--samples", "32", *options, "--out", str(out), code=2)
        assert said in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_freezing_needs_a_model_that_can_be_cut(self, tmp_path):
        torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "x.pth")
        chosen = frozen(tmp_path / "x.pth", architecture="timm:test_vit2")
        with pytest.raises(UsageError, match="freeze_below: expected a model that can be cut"):
            run(chosen, tmp_path / "out", console=quiet())
        assert not (tmp_path / "out.partial").exists()

    def test_old_checkpoints_of_diverse_vit_still_fit(self):
        known = json.loads(_identity(Settings(), Task("erm", 0)))
        for name in ("architecture", "pretrained", "freeze_below"):
            del known[name]
        assert _is_identity(json.dumps(known), Settings(), Task("erm", 0))
        assert not _is_identity(json.dumps(known), settings(), Task("erm", 0))
