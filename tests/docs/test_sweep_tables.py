"""Pages about sweeps print what was recorded: their tables are those of the JSON files beside them."""

import json

import pytest

from diversevit_fast.experiment import Grid
from diversevit_fast.experiment.sweep_folder import SweepFolder
from diversevit_fast.experiment.sweep_report import ALL_HEADS, BEST_HEAD
from tests.helpers.pages import PAGES, ROOT
from tools.docs.sweep_tables import KEPT, added, compact, main, tables, with_tables

pytest.importorskip("scipy")
RESULTS = ROOT / "docs/science/results"
WRITTEN = {f"docs/science/{name}.md": RESULTS / f"{name}.json" for name in ("lambda", "factorial")}


@pytest.mark.parametrize("page", WRITTEN)
def test_tables_are_those_of_the_results(page):
    results = json.loads(WRITTEN[page].read_text("utf-8"))
    assert with_tables(PAGES[page], results) == PAGES[page]
    first = results["rows"][0]
    first["test_ood"] = 1 - first["test_ood"]
    assert with_tables(PAGES[page], results) != PAGES[page]


def made_up() -> dict:
    """Results of three seeds, where the penalty adds 0.1."""
    grid = Grid.of({"penalty_weight": [0.0, 2.0]}, seeds=(0, 1, 2))
    rows = [
        {
            **dict.fromkeys(KEPT, 0.5),
            **{"penalty_weight": weight, "rule": rule, "role": "reported", "seed": seed},
            **{"commit": "abc", "penalty": 0.00012, "test_ood": 0.6 + 0.05 * weight + 0.01 * seed},
        }
        for seed in grid.seeds
        for weight in (0.0, 2.0)
        for rule in (BEST_HEAD, ALL_HEADS)
    ]
    samples = {"train": 10000}
    return {"grid": grid.to_json(), "cells": 6, "torch": "2", "samples": samples, "rows": rows}


def test_numbers_of_a_table():
    said = tables(made_up())
    assert "Commit abc, torch 2; 6 of 6 trainings are finished. Images: train 10,000." in said
    assert "| 0 | 3 | 0.610 (0.600 to 0.620) | 0.610 | 0.500 | 1.2e-04 | 0.500 | 0.5 |" in said
    assert "| 2 | +0.100 |" in said
    assert "| 0.1 | 0.1 | 0.1 | cannot tell |" in said


def of_seeds(*seeds: int) -> dict:
    """The made-up results of some seeds."""
    results = made_up()
    rows = [row for row in results["rows"] if row["seed"] in seeds]
    grid = {**results["grid"], "seeds": list(seeds)}
    return {**results, "grid": grid, "cells": 2 * len(seeds), "rows": rows}


def test_seeds_of_another_sweep_are_added():
    assert tables(added(of_seeds(0, 2), of_seeds(1))) == tables(made_up())
    both = added(of_seeds(0), {**of_seeds(1), "torch": "3"})
    assert (both["cells"], both["torch"]) == (4, "2, 3")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (of_seeds(0, 1), "both sweeps have trained seed 0"),
        ({**of_seeds(1), "samples": {"train": 5}}, "differ in samples"),
        ({**of_seeds(1), "grid": {**of_seeds(1)["grid"], "varied": {}}}, "differ in varied"),
    ],
)
def test_what_cannot_be_added(more, said):
    with pytest.raises(ValueError, match=said):
        added(of_seeds(0), more)


def test_a_page_without_a_place_for_them_is_refused():
    with pytest.raises(ValueError, match="one pair"):
        with_tables("no markers", made_up())


def test_what_is_kept_of_a_sweep(tmp_path):
    """Of a sweep without a finished training: the grid, without where this machine keeps things."""
    grid = Grid.of({"lr": [0.1, 0.2]}, seeds=(0, 1), source="/home/me/data.npz", threads=3)
    samples = {"train": {"samples": 8, "groups": {"a + 0": 8}}}
    more = {"splits": {"data": samples}, "versions": {"torch": "2"}, "commit": "abc"}
    sweep = SweepFolder.create(tmp_path / "sweep", grid, more)
    kept = compact(sweep.path)
    assert kept["samples"] == {"train": 8}
    assert "/home" not in json.dumps(kept)
    assert "seeds" not in kept["grid"]["fixed"]
    again = Grid.from_json(kept["grid"])
    assert (again.varied, again.seeds, again.fixed.lr) == (grid.varied, grid.seeds, 0.1)
    main(str(sweep.path), str(tmp_path / "kept.json"))
    assert json.loads((tmp_path / "kept.json").read_text()) == json.loads(json.dumps(kept))
