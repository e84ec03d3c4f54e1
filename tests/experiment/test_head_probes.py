"""Probes of a run: made once, shown on the page, and again by ``diversevit probe``."""

import csv
import importlib
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.data import load_splits
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import head_probes, metrics, resolve, resume, run, write_report
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.head_probes import examples, probe_weights, subset_accuracies
from diversevit_fast.files import FileError
from diversevit_fast.models import DiverseViT

rich_console = pytest.importorskip("rich.console")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = {
    **{"samples": 64, "epochs": 1, "batch_size": 32, "seeds": (0,), "threads": 1, "workers": 1},
    "model": {
        **{"patch_size": 16, "dim": 16, "depth": 2},
        **{"num_heads": 3, "head_dim": 8, "mlp_dim": 16},
    },
}
TASKS = ("erm-seed0", "diversevit-seed0")


def quiet():
    return rich_console.Console(file=io.StringIO())


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return run(resolve(TINY), tmp_path_factory.mktemp("runs") / "run", console=quiet())


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture(scope="module")
def splits():
    return load_splits("digits-photos", samples=64)


def call(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    return int(exit_.value.code or 0), said.out + said.err


def text_of(page: Path) -> str:
    html = re.sub(r"<(style|title)>.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_a_run_probes_the_weights_of_selected_heads(original):
    rows = metrics.read_csv(original / "metrics.csv")
    for task in TASKS:
        probes = dvf.HeadProbes.from_json(original / f"{task}.probes.json")
        with (original / f"{task}.probes.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(probes.table) == 3
        rows_of = metrics.of_run(rows, task.partition("-")[0], 0)
        for row in probes.table:
            alone = metrics.find(rows_of, 1, "test_ood", str(row["head"]))
            assert row["use_core"] >= alone["worst_group"]
            assert "swap_core" not in row  # twice as many forwards: only on demand
        for found in probes.extra["subsets"]:
            for split in ("test_id", "test_ood"):
                heads = "all" if len(found["heads"]) == 3 else str(found["heads"][0])
                if len(found["heads"]) in (1, 3):
                    test = metrics.find(rows_of, 1, split, heads)
                    assert found[split] == pytest.approx(test["accuracy"])


def test_subsets_are_those_of_keep_heads(splits):
    torch.manual_seed(0)
    model = DiverseViT(num_classes=2, **TINY["model"]).eval()
    found = subset_accuracies(model, splits)
    assert [s["heads"] for s in found] == [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
    assert len({s["test_ood"] for s in found}) > 1
    dataset = splits["test_ood"]
    for subset in found:
        with torch.no_grad(), dvf.keep_heads(model, {-1: subset["heads"]}):
            hits = model(dataset.images.float() / 255).argmax(1) == dataset.labels
        assert subset["test_ood"] == pytest.approx(hits.double().mean().item())


def test_subsets_of_any_model(splits):
    """One that is no DiverseViT goes through the prefix cache, to the same accuracies."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            return self.inner(images)

    torch.manual_seed(0)
    model = DiverseViT(num_classes=2, **TINY["model"]).eval()
    assert subset_accuracies(Wrapped(model), splits) == subset_accuracies(model, splits)
    many = DiverseViT(num_classes=2, **{**TINY["model"], "num_heads": 9})
    assert subset_accuracies(many, splits) == []


def test_examples_are_one_image_of_each_group_with_its_attention(splits):
    torch.manual_seed(0)
    model = DiverseViT(num_classes=2, **TINY["model"]).eval()
    dataset = splits["test_ood"]
    shown = examples(model, dataset)
    assert [e["group"] for e in shown] == list(dataset.group_names)
    for group, example in enumerate(shown):
        i = int((dataset.groups == group).nonzero()[0])
        with torch.no_grad(), dvf.capture_heads(model, maps="class") as heads:
            model(dataset.images[i : i + 1].float() / 255)
        patches = heads.maps[-1][0, :, 0, 1:].unflatten(-1, (4, 2))
        torch.testing.assert_close(torch.tensor(example["maps"]), patches, atol=1e-5, rtol=0)
        assert example["size"] == [64, 32]


def test_the_page_says_what_each_head_does(original):
    text = text_of(original / "report.html")
    assert "What each head does" in text
    assert "on 64 images of OOD test" in text
    for said in ("What heads use.", "What heads hold.", "Where heads look", "linear CKA"):
        assert said in text
    for task in TASKS:
        probes = dvf.HeadProbes.from_json(original / f"{task}.probes.json")
        counts = [f"{probes.counts[k]:.1f}" for k in ("robust", "spurious", "neither", "dead")]
        special = probes.specialisation
        shown = "–" if special != special else f"{special:.3f}"
        name = {"erm": "ERM", "diversevit": "DiverseViT"}[task.partition("-")[0]]
        assert f"{name} {' '.join(counts)} {shown}" in text


def test_a_run_without_probes_has_a_page(folder):
    for path in folder.glob("*.probes.*"):
        path.unlink()
    text = text_of(write_report(folder))
    assert "Not probed. diversevit probe with this folder" in text


def test_what_was_not_probed_is_named(folder):
    (folder / "erm-seed0.probes.json").unlink()
    assert "Not probed: erm-seed0." in text_of(write_report(folder))


def test_probing_a_run_is_resumed(folder, capsys, monkeypatch):
    code, said = call(capsys, "probe", folder)
    assert code == 0
    assert "OOD test of digits-photos" in said
    for task in TASKS:
        assert f"\n{task}\n" in said
    row = dvf.HeadProbes.from_json(folder / "erm-seed0.probes.json").table[0]
    assert {"swap_core", "swap_spurious", "mass_core"} <= row.keys()
    assert f"{row['use_core']:.2f} {row['use_spurious']:.2f}" in said
    assert said.count("specialisation") == 2
    (folder / "erm-seed0.probes.json").write_text("{")  # as a kill never leaves it
    probed = []
    probe = head_probes.probe_heads
    monkeypatch.setattr(
        head_probes, "probe_heads", lambda *a, **k: probed.append(a) or probe(*a, **k)
    )
    code, said = call(capsys, "probe", folder)
    assert (code, len(probed)) == (0, 1)
    assert "diversevit-seed0, probed before" in said
    assert "\nerm-seed0\n" in said
    code, said = call(capsys, "probe", folder, "--split", "val_ood")
    assert (code, len(probed)) == (0, 3)
    assert text_of(write_report(folder)).count("64 images of OOD validation") == 1


def test_probing_one_file_and_all_layers(folder, capsys):
    code, _ = call(capsys, "probe", folder / "erm-seed0-last.safetensors", "--layers", "all")
    assert code == 0
    probes = dvf.HeadProbes.from_json(folder / "erm-seed0-last.probes.json")
    assert [(r["layer"], r["head"]) for r in probes.table] == [
        (layer, head) for layer in (0, 1) for head in range(3)
    ]
    assert (folder / "erm-seed0-last.probes.csv").exists()
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "first"], "layers: expected one of last, all"),
        (["--split", "train"], "split: expected one of val_id"),
        (["--data", "nonsense"], "data: expected one of"),
    ],
)
def test_mistakes_exit_with_2(arguments, said, folder, capsys):
    code, printed = call(capsys, "probe", folder, *arguments)
    assert code == 2
    assert printed.startswith(f"error: {said}")


def test_a_folder_without_weights_is_one_line(tmp_path, capsys):
    code, said = call(capsys, "probe", tmp_path)
    assert code == 2
    assert "weights: expected a run with weights (.safetensors), got" in said


def test_a_damaged_file_is_one_line(folder):
    path = folder / "erm-seed0.probes.json"
    held = json.loads(path.read_text())
    for damaged in ("{", json.dumps({**held, "table": []})):
        path.write_text(damaged)
        with pytest.raises(UsageError, match="probes: expected a file of HeadProbes"):
            write_report(folder)
    path.write_text(json.dumps({**held, "whole": {}}))
    with pytest.raises(UsageError, match="report: expected the files of a run"):
        write_report(folder)


def test_what_cannot_be_probed_does_not_stop_a_run(tmp_path):
    """Two images with the same digit."""
    console = rich_console.Console(file=io.StringIO(), width=200)
    out = run(resolve({**TINY, "samples": 2}), tmp_path / "run", console=console)
    said = console.file.getvalue()
    assert "no probes of erm-seed0: attributes['spurious']: expected at least two values" in said
    assert "Not probed." in text_of(out / "report.html")


def test_a_full_disk_is_no_lack_of_groups(original, splits, monkeypatch):
    """What the system refuses stops a run, which can be resumed."""

    def refuse(*_, **__):
        raise FileError("no space left")

    monkeypatch.setattr(head_probes, "probe_weights", refuse)
    with pytest.raises(FileError):
        head_probes.try_to_probe(original / "erm-seed0.safetensors", splits, torch.device("cpu"))


def test_a_resumed_run_has_its_probes(tmp_path, monkeypatch):
    running = importlib.import_module("diversevit_fast.experiment.run")
    out = tmp_path / "run"
    monkeypatch.setattr(
        running, "try_to_probe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(resolve({**TINY, "methods": ("erm",)}), out, console=quiet())
    monkeypatch.undo()
    resume(out, console=quiet())
    assert (out / "erm-seed0.probes.json").exists()


def test_the_digit_is_above(original, splits):
    model = DiverseViT.load(original / "erm-seed0.safetensors").eval()
    regions = head_probes.regions_of(splits["test_ood"])
    assert regions is not None
    assert regions["spurious"][:32].all()
    assert not regions["spurious"][32:].any()
    assert (regions["core"] == ~regions["spurious"]).all()
    attributes = head_probes.attributes_of(splits["test_ood"])
    assert attributes["spurious"] is splits["test_ood"].digits
    _, there = probe_weights(original / "erm-seed0.safetensors", model, splits)
    assert there
