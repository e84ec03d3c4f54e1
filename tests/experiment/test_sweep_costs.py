"""What a sweep says of the cost of its cells: that of the same step, predicted once."""

import dataclasses
import json

import pytest

import diversevit_fast as dvf
from diversevit_fast.experiment import sweep_costs
from diversevit_fast.experiment.config import Settings
from diversevit_fast.experiment.sweep_costs import COSTS, costs_of
from diversevit_fast.experiment.sweep_results import COLUMNS
from diversevit_fast.models import DiverseViT
from tests.cost.test_predict import MACHINE

SIZES = {"patch_size": 8, "depth": 2, "dim": 32, "num_heads": 2, "head_dim": 16, "mlp_dim": 32}
SETTINGS = Settings(methods=("diversevit",), seeds=(0,), batch_size=6, model=SIZES)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_costs, "load", lambda: None)
    made = DiverseViT(image_size=(16, 32), **SIZES)
    made.save(tmp_path / "w.safetensors")
    return made


def found(tmp_path, settings=SETTINGS, gpu=None):
    return costs_of(settings, gpu, tmp_path / "w.safetensors", tmp_path / "costs")


def test_they_are_those_of_the_step(model, tmp_path):
    images = (3, 16, 32)
    for weight, layers in ((100.0, "last"), (0.0, None)):
        settings = dataclasses.replace(SETTINGS, penalty_weight=weight)
        direct = dvf.cost(model, layers, batch=6, optimizer="adam", inputs=images)
        assert list(found(tmp_path, settings).values()) == [
            sum(direct.flops.values()),
            direct.peak_bytes,
            None,
        ]
    assert COLUMNS[-3:] == COSTS


def test_what_costs_the_same_is_predicted_once(model, tmp_path):
    first = found(tmp_path)
    (tmp_path / "w.safetensors").unlink()  # whoever predicts again cannot
    for change in ({"seeds": (7,)}, {"lr": 1.0}, {"penalty_weight": 3.0}, {"epochs": 2}):
        assert found(tmp_path, dataclasses.replace(SETTINGS, **change)) == first
    assert len(list((tmp_path / "costs").iterdir())) == 1
    other = found(tmp_path, dataclasses.replace(SETTINGS, batch_size=7))
    assert other == dict.fromkeys(COSTS)  # its file of weights is gone
    assert len(list((tmp_path / "costs").iterdir())) == 2


def test_seconds_where_the_machine_was_measured(model, tmp_path, monkeypatch):
    without = found(tmp_path)
    monkeypatch.setattr(sweep_costs, "load", lambda: MACHINE)
    seconds = dvf.cost(model, "last", batch=6, optimizer="adam", device=MACHINE).seconds
    assert found(tmp_path) == {**without, COSTS[2]: pytest.approx(seconds.step)}


def test_a_gpu_that_the_table_lacks_has_none(model, tmp_path):
    assert found(tmp_path, gpu="NVIDIA GeForce RTX 9999") == dict.fromkeys(COSTS)
    kept = [json.loads(path.read_text()) for path in (tmp_path / "costs").iterdir()]
    assert kept == [dict.fromkeys(COSTS)]


def test_a_calibration_of_another_machine_counts_as_none(monkeypatch):
    def other():
        sweep_costs.warnings.warn("measured on another machine", stacklevel=1)
        return MACHINE

    monkeypatch.setattr(sweep_costs, "load", other)
    assert sweep_costs._calibration() is None
