"""Optimizer, precision and augmentation of a training: what they do, and that a resumed run repeats them."""

import io
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.console import Console

from diversevit_fast.data import load_splits
from diversevit_fast.experiment import Settings, resolve, resume, run
from diversevit_fast.experiment.checkpoint import State, Task
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.distributed import OneProcess
from diversevit_fast.experiment.recipe import Augmentation, make_optimizer
from diversevit_fast.experiment.run import Interrupted
from tests.experiment.test_experiment import contents
from tests.experiment.test_graph_option import MODEL, Silent
from tests.experiment.test_report import text_of
from tests.helpers.interrupts import interrupted_after_an_epoch
from tests.helpers.stand_in_graphs import stand_in_graphs

TINY = json.loads(Path(__file__).with_name("tiny_run.json").read_text())
ONE = {**TINY, "methods": ("diversevit",), "seeds": (0,)}
RECIPES = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "weight_decay": 0.1, "lr": 0.05},
    "bf16": {"amp": "bf16"},
    "augment": {"augment": ("flip", "crop")},
}


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Path:
    return run(resolve(ONE), tmp_path_factory.mktemp("runs") / "usual", console=quiet())


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_ends_with_the_same_bits(name, usual, tmp_path):
    chosen = resolve({**ONE, **RECIPES[name]})
    whole = run(chosen, tmp_path / "whole", console=quiet())
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        run(chosen, tmp_path / "out", console=quiet())
    assert contents(resume(tmp_path / "out", console=quiet())) == contents(whole)
    assert contents(whole) != contents(usual)
    recorded = json.loads((whole / "config.json").read_text())["settings"]
    assert Settings.from_json(recorded) == chosen


@pytest.mark.parametrize(
    ("optimizer", "shrinks"), [("adamw", True), ("sgd", True), ("adam", False)]
)
def test_weight_decay_without_gradients(optimizer, shrinks):
    """AdamW and SGD shrink a weight by rate times decay; Adam's L2 term is a gradient, so it takes a whole step."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    settings = Settings(optimizer=optimizer, weight_decay=0.25, lr=0.1)
    layer.weight.grad = torch.zeros_like(layer.weight)
    make_optimizer(layer, settings, "diversevit").step()
    moved = 2.0 - layer.weight.item()
    assert moved == pytest.approx(2.0 * 0.1 * 0.25 if shrinks else 0.1)


def test_sgd_has_momentum():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(layer, Settings(optimizer="sgd", erm_lr=0.1), "erm")
    before = layer.weight.item()
    for _ in range(2):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    assert before - layer.weight.item() == pytest.approx(0.1 * (1 + 1.9))


@pytest.mark.parametrize("name", ["adamw", "sgd", "bf16"])
def test_recorded_steps_are_those_without_graphs(name):
    """``graph`` on a stand-in for a GPU: recorded and replayed, a training ends as it does step by step.

    In bfloat16 by SGD: Adam's captured formula rounds otherwise, and bfloat16 makes differences of that larger.
    """
    train = sys.modules["diversevit_fast.experiment.train"]
    dataset = load_splits("digits-photos", samples=64)["train"]
    slow = {"optimizer": "sgd"} if name == "bf16" else {}
    ends = []
    for recorded in (True, False):
        settings = resolve(
            {**ONE, "batch_size": 32, "model": MODEL, "graph": recorded, **RECIPES[name], **slow}
        )
        task, ranks = Task("diversevit", 0), OneProcess(torch.device("cpu"))
        state = State.fresh(settings, task, dataset, ranks.device)
        regulariser = train.Regulariser.of(settings, state.trained)
        with stand_in_graphs() if recorded else nullcontext() as recorder:
            step = train.stepper(settings, task, state, regulariser, ranks)
            given = settings, task, state, regulariser, dataset, Silent(), ranks, step
            for rate in (0.01, 0.001):
                state.optimizer.param_groups[0]["lr"] = rate
                train._train_epoch(*given)
            if recorder is not None:
                assert sum(graph.replays for graph in recorder.graphs) > 0
        ends.append(torch.cat([p.detach().flatten() for p in state.model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", [True, False])
def test_training_alone_is_cast(graph, tmp_path, monkeypatch):
    seen = {"training": set(), "evaluation": set()}
    train = sys.modules["diversevit_fast.experiment.train"]
    objective, evaluate = train._objective, train.evaluate_splits
    on = lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))  # noqa: E731
    monkeypatch.setattr(
        train, "_objective", lambda *given: (seen["training"].add(on()), objective(*given))[1]
    )
    monkeypatch.setattr(
        train,
        "evaluate_splits",
        lambda *given: (seen["evaluation"].add(on()[0]), evaluate(*given))[1],
    )
    chosen = resolve({**ONE, "epochs": 1, "amp": "bf16", "graph": graph})
    run(chosen, tmp_path / "out", console=quiet())
    assert seen == {"training": {(True, torch.bfloat16)}, "evaluation": {False}}


class TestAugmentation:
    images = torch.arange(64 * 3 * 16 * 8, dtype=torch.float32).view(64, 3, 16, 8)

    def changed(self, *kinds: str, seed: int = 0) -> torch.Tensor:
        return Augmentation(kinds, torch.Generator().manual_seed(seed))(self.images)

    def test_flips_some(self):
        changed = self.changed("flip")
        kept = [torch.equal(a, b) for a, b in zip(changed, self.images, strict=True)]
        mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(changed, self.images, strict=True)]
        assert [not k for k in kept] == mirrored
        assert 16 < sum(kept) < 48

    def test_crops_are_windows_of_the_mirrored_border(self):
        padded = nn.functional.pad(self.images, (1, 1, 2, 2), mode="reflect")
        windows = {
            (top, left): padded[:, :, top : top + 16, left : left + 8]
            for top in range(5)
            for left in range(3)
        }
        found = set()
        for i, image in enumerate(self.changed("crop")):
            (at,) = [at for at, window in windows.items() if torch.equal(window[i], image)]
            found.add(at)
        assert {top for top, _ in found} == set(range(5))
        assert {left for _, left in found} == set(range(3))

    def test_draws_follow_from_the_epoch(self):
        assert torch.equal(self.changed("flip", "crop"), self.changed("flip", "crop"))
        assert not torch.equal(self.changed("flip", "crop"), self.changed("flip", "crop", seed=1))
        assert torch.equal(self.changed(), self.images)


def test_options_reach_the_settings_and_the_page(tmp_path, capsys):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({**TINY, "epochs": 1}))
    with pytest.raises(SystemExit) as end:
        main(
            [
                *("train", "erm", "--config", str(config), "--out", str(tmp_path / "out")),
                *("--optimizer", "sgd", "--weight-decay", "0.01", "--amp", "bf16"),
                *("--augment", "flip, crop"),
            ]
        )
    assert end.value.code == 0, capsys.readouterr().err
    got = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    wanted = {"optimizer": "sgd", "weight_decay": 0.01, "amp": "bf16", "augment": ["flip", "crop"]}
    assert {name: got[name] for name in wanted} == wanted
    said = "with random flip and crop, SGD with momentum 0.9 with weight decay 0.01, autocast to bfloat16"
    assert said in text_of(tmp_path / "out" / "report.html")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--optimizer", "lion"], "optimizer: expected one of adam, adamw, sgd, got 'lion'"),
        (["--weight-decay", "-1"], "weight_decay: expected a number of at least 0"),
        (["--weight-decay", "nan"], "weight_decay: expected a number of at least 0"),
        (["--amp", "fp16"], "amp: expected bf16"),
        (["--augment", "rotate"], "augment: expected different kinds among flip, crop"),
        (["--augment", "flip,flip"], "augment: expected different kinds among flip, crop"),
        (
            [
                *(
                    "--model",
                    "timm:vit_tiny_patch16_224",
                    "--weights",
                    "x",
                    "--freeze-below",
                    "last",
                ),
                *("--augment", "flip"),
            ],
            "augment: expected nothing with freeze_below, got flip",
        ),
        (["--augment", ""], "augment: expected different kinds among flip, crop"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["run", *options])
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert said in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())
