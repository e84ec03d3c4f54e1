"""``select-heads --criterion``: a rule's choice, its data and its options."""

import re
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from diversevit_fast.data import load_splits
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.criteria import rank, table_of
from diversevit_fast.heads.criteria import head_criteria
from diversevit_fast.models import DiverseViT

SIZES: Any = {"patch_size": 16, "depth": 2, "dim": 16, "num_heads": 3, "head_dim": 8, "mlp_dim": 16}
DATA = ("--samples", "160", "--correlation", "0.7")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = DiverseViT(**SIZES)
    with torch.no_grad():
        model.patch_embed.weight *= 30  # so that predictions depend on the images
    model.save(path)
    return path


@pytest.fixture(scope="module")
def table(weights):
    splits = load_splits("digits-photos", samples=160, correlation=0.7)
    model = DiverseViT.load(weights).eval()
    return table_of(model, {"id": splits["val_id"], "ood": splits["val_ood"]})


def call(*arguments, capsys, code=0):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert ended.value.code == code
    said = capsys.readouterr()
    return said.err if code else said.out


@pytest.mark.parametrize("criterion", [c for c in head_criteria() if c != "agreement_drop"])
@pytest.mark.parametrize("search", ["single", "exhaustive"])
def test_shows_the_choice_of_the_criterion(weights, table, capsys, criterion, search):
    arguments = ("select-heads", weights, *DATA, "--criterion", criterion, "--search", search)
    printed = call(*arguments, capsys=capsys)
    best = rank(table, criterion, search)[0][0]
    first = next(line for line in printed.splitlines() if re.match(r"\d", line))
    heads = ", ".join(map(str, best.kept[1]))
    assert re.match(rf"{heads} +{best.score:.3f}", first)
    assert f"selected: {heads} " in printed
    assert (f"{best.error:.3f}" in first) if best.error is not None else "error" not in printed


def test_few_labels_sees_as_many_as_it_may(weights, table, capsys):
    arguments = ("select-heads", weights, *DATA, "--criterion", "few_labels", "--labels")
    for labels in (8, 160):
        best = rank(table, "few_labels", "single", labels)[0][0]
        assert f"{best.score:.3f}" in call(*arguments, labels, capsys=capsys)
    every = rank(table, "few_labels", "single", 160)[0]
    assert [c.score for c in every] == pytest.approx(
        [c.score for c in rank(table, "accuracy", "single")[0]]
    )


def test_lists_the_criteria_without_weights(capsys):
    printed = call("select-heads", "--list-criteria", capsys=capsys)
    for criterion in head_criteria().values():
        assert all(text in printed for text in (criterion.name, criterion.needs, criterion.failure))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--criterion", "best"], "criterion: expected one of accuracy, worst_group"),
        (["--criterion", "mano", "--score", "accuracy"], "criterion: expected --score or"),
        (["--criterion", "mano", "--search", "greedy"], "search: expected a search that a table"),
        (["--criterion", "mano", "--labels", "8"], "labels: expected --criterion few_labels"),
        (["--labels", "8"], "labels: expected --criterion few_labels, got no criterion"),
        ([*DATA, "--criterion", "few_labels", "--labels", "1"], "k: expected a number of images"),
        (["--samples", "40", "--criterion", "mistakes"], "table['id']: expected at least 30"),
    ],
)
def test_what_is_refused(weights, capsys, options, message):
    said = call("select-heads", weights, *options, capsys=capsys, code=2)
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
