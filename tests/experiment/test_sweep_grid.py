"""Which cells a sweep has: every combination on every seed, in order, and every list that is refused."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import Grid, Settings
from diversevit_fast.experiment.sweep_grid import (
    as_text,
    parse_list,
    parse_seeds,
    parse_weights,
    said_of,
)

LISTS = {"penalty_weight": [0.0, 0.1, 1.0], "lr": [1e-4, 1e-3]}


def grid(lists=LISTS, seeds=(0, 1), **more) -> Grid:
    return Grid.of(lists, seeds=seeds, **more)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from([0.0, 0.01, 1.0, 10.0]), min_size=1, unique=True),
    st.lists(st.sampled_from([1e-4, 3e-4, 1e-3]), min_size=1, unique=True),
    st.lists(st.sampled_from(["last", "all", (0, -1), (-1,)]), min_size=1, unique=True),
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(100, 109), max_size=3, unique=True),
)
def test_every_combination_on_every_seed_once(weights, lrs, layers, seeds, pilots):
    lists = {"penalty_weight": weights, "lr": lrs, "layers": layers}
    cells = grid(lists, seeds, pilot_seeds=pilots).cells()
    found = [
        (c.seed, c.role, c.settings.penalty_weight, c.settings.lr, c.settings.layers) for c in cells
    ]
    wanted = [
        (seed, role, w, lr, layer)
        for role, some in (("pilot", pilots), ("reported", seeds))
        for seed in some
        for w in weights
        for lr in lrs
        for layer in layers
    ]
    assert found == wanted
    assert len({c.name for c in cells}) == len(cells)
    for cell in cells:
        assert cell.settings.methods == (
            ("diversevit",) if cell.settings.penalty_weight else ("erm",)
        )
        assert cell.settings.erm_lr == cell.settings.lr
        assert all(word not in cell.name for word in ("/", " ", "\0"))


def test_what_erm_ignores_is_trained_once():
    cells = grid({"penalty_weight": [0.0, 1.0], "every": [2, 4]}, (0,)).cells()
    assert [(c.settings.penalty_weight, c.settings.every) for c in cells] == [
        (0, 1),
        (1, 2),
        (1, 4),
    ]


def test_a_grid_survives_its_file():
    whole = grid({"layers": ["last", (0, -1)], "correlation": [0.9, 0.95]}, (3,), pilot_seeds=[100])
    again = Grid.from_json(whole.to_json())
    assert again == whole
    assert again.cells() == whole.cells()


def test_names_stand_for_settings_and_nothing_else():
    """Else a later version would not find the cells of an earlier one, or would take one for another."""
    names = {c.name for c in grid().cells()}
    assert names.isdisjoint(c.name for c in grid(epochs=3).cells())
    assert names.isdisjoint(c.name for c in grid(model={"depth": 2}).cells())
    assert names == {c.name for c in grid(threads=3, tensorboard=True).cells()}


def test_a_setting_that_has_its_default_is_not_said():
    default = Settings()
    assert said_of(default, ()) == "{}"
    changed = dataclasses.replace(default, batch_size=3, every=2)
    assert said_of(changed, ("every",)) == '{"batch_size": 3}'


def test_the_first_name_as_an_earlier_version_gave_it():
    assert grid(preset="paper").cells()[0].name == "penalty_weight=0,lr=0.0001,seed=0-3d21876c"


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("penalty_weight", "0, 0.01,1e2", [0.0, 0.01, 100.0]),
        ("epochs", "8,12", [8, 12]),
        ("samples", "8", [8]),
        ("correlation", "0.9,1", [0.9, 1.0]),
        ("layers", "last,all,0/-1,-1", ["last", "all", (0, -1), (-1,)]),
        ("wrt", "input,output", ["input", "output"]),
        ("optimizer", "adam,sgd", ["adam", "sgd"]),
        ("weight_decay", "0,0.05", [0.0, 0.05]),
        ("amp", "none,bf16", [None, "bf16"]),
        ("augment", "none, flip,flip/crop", [(), ("flip",), ("flip", "crop")]),
        ("schedule_epochs", "none,8", [None, 8]),
        ("architecture", "diversevit,timm:vit", ["diversevit", "timm:vit"]),
        ("pretrained", "none,a.pth", [None, "a.pth"]),
    ],
)
def test_lists(name, text, values):
    assert parse_list(name, text) == values


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lr", "", "lr: expected a comma list of values, got an empty one; say 0.1,1"),
        ("lr", " ", "an empty one"),
        ("lr", "1,,2", "lr: expected a comma list of numbers, got ''"),
        ("lr", "1,x", "got 'x'"),
        ("epochs", "1.5", "epochs: expected a comma list of whole numbers, got '1.5'"),
        ("layers", "0-1", "layers: expected last, all or numbers such as 0/-1, got '0-1'"),
        ("augment", "flip,", "augment: expected a comma list of names, got ''"),
        ("weight_decay", "none", "weight_decay: expected a comma list of numbers, got 'none'"),
    ],
)
def test_lists_that_are_refused(name, text, message):
    with pytest.raises(UsageError, match=message):
        parse_list(name, text)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("0,3,5-7", [0, 3, 5, 6, 7]), ("4-4", [4]), (" 1 - 2 , 9", [1, 2, 9])],
)
def test_seeds(text, seeds):
    assert parse_seeds("seeds", text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got ''"),
        ("a", "got 'a'"),
        ("1,,2", "expected seeds such as 0-9"),
        ("3-1", "ranges that go up, got 3-1; say 1-3"),
        ("0-99999", "at most 1000"),
        ("5", "say 0-4 for so many, 5-5 for this seed alone"),
        ("-1", "got '-1'"),
    ],
)
def test_seeds_that_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_seeds("seeds", text)


@pytest.mark.parametrize(
    ("lists", "more", "message"),
    [
        ({"lr": []}, {}, "lr: expected at least one value, got an empty list"),
        ({"lr": [0.1, 0.10]}, {}, "lr: expected different values, got 0.1 twice"),
        ({"lr": [-1.0, 0.1]}, {}, "lr: expected a number above 0"),
        ({"lr": [0.1, -1.0]}, {}, "lr: expected a number above 0"),
        ({"data": ["digits-photos", "none"]}, {}, "data: expected one of"),
        ({"threads": [1, 2]}, {}, "threads: expected a setting that can vary"),
        ({"erm_lr": [1, 2]}, {}, "erm_lr: expected a setting that can vary"),
        ({"optimizer": ["adam", "lion"]}, {}, "optimizer: expected one of adam, adamw, sgd"),
        ({"augment": [(), ("rotate",)]}, {}, "augment: expected different kinds among flip"),
        ({"amp": [None, None]}, {}, "amp: expected different values, got none twice"),
        ({"freeze_below": [None, "last"]}, {}, "freeze_below: expected a setting that can vary"),
        (
            {"architecture": ["diversevit", "timm:a"], "pretrained": [None, "a"]},
            {},
            "pretrained: expected files by model for several models",
        ),
        (
            {"architecture": ["diversevit", "timm:a"]},
            {"weights": {"timm:b": "b.pth"}},
            "weights: expected files of models that vary, got 'timm:b'",
        ),
        ({}, {"weights": {"diversevit": "b.pth"}}, "weights: expected files of models that vary"),
        ({}, {"seeds": ()}, "seeds: expected at least one value"),
        ({}, {"seeds": (1, 1)}, "seeds: expected different values, got 1 twice"),
        ({}, {"seeds": (2**32,)}, "seeds: expected different whole numbers"),
        (
            {},
            {"pilot_seeds": (1, 7)},
            r"pilot_seeds: expected seeds that are not reported, got \[1\]",
        ),
        ({"lr": [x / 1000 for x in range(1, 1001)]}, {"seeds": range(200)}, "at most 100000 cells"),
    ],
)
def test_grids_that_are_refused(lists, more, message):
    with pytest.raises(UsageError, match=message):
        grid(lists, **more)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_text_of_a_number_is_that_number(value):
    assert float(as_text(value)) == value


def test_trainings_keep_no_checkpoints_unless_asked():
    """As those of an older version, whose file does not say."""
    assert not grid().fixed.keep_checkpoints
    asked = grid(keep_checkpoints=True)
    assert all(cell.settings.keep_checkpoints for cell in asked.cells())
    assert [c.name for c in asked.cells()] == [c.name for c in grid().cells()]
    old = grid().to_json()
    del old["fixed"]["keep_checkpoints"]
    assert Grid.from_json(old) == grid()


def test_recipes_vary():
    lists = {
        "optimizer": ["adam", "sgd"],
        "amp": [None, "bf16"],
        "augment": [(), ("flip", "crop")],
        "pretrained": [None, "a.pth"],
    }
    whole = grid(lists, (0,))
    assert len(whole.settings()) == 16
    assert Grid.from_json(whole.to_json()) == whole
    names = [cell.name for cell in whole.cells()]
    assert names[0].startswith("optimizer=adam,amp=none,augment=none,pretrained=none,seed=0-")
    assert "augment=flip_crop" in names[-1]
    assert len(set(names)) == 16


@pytest.mark.parametrize("first", ["diversevit", "timm:a"])
def test_models_vary_with_their_weights(first):
    """Sizes of DiverseViT are those of the preset, whichever model is listed first; the others have none."""
    models = sorted(["diversevit", "timm:a", "timm:b"], key=lambda name: name != first)
    whole = grid({"architecture": models}, (0,), weights={"timm:b": "b.pth"}, preset="quick")
    found = {s.architecture: (s.pretrained, s.model) for s in whole.settings()}
    assert list(found) == models
    assert found == {
        "diversevit": (None, {"patch_size": 8, "depth": 3, "head_dim": 32}),
        "timm:a": (None, {}),
        "timm:b": ("b.pth", {}),
    }
    assert Grid.from_json(whole.to_json()) == whole
    absolute = whole.with_files(lambda name: f"/files/{name}")
    assert {s.pretrained for s in absolute.settings()} == {None, "/files/b.pth"}
    assert "weights" not in grid().to_json()  # files of sweeps without are as they were


def test_weights_are_one_for_each_model():
    assert parse_weights(["a", "b", "c"], "x.pth,none,y.pth") == {"a": "x.pth", "c": "y.pth"}
    with pytest.raises(UsageError, match="pretrained: expected as many files as models, 2, got 1"):
        parse_weights(["a", "b"], "x.pth")
