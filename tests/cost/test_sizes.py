"""A step at other sizes, on several GPUs, and the figure of both."""

import json
import struct
from xml.etree import ElementTree

import pytest

import diversevit_fast as dvf
from diversevit_fast.cost import cost_by_size, over_erm
from tests.cost.test_counting import vit
from tests.cost.test_predict import MACHINE, run

MODEL = "vit_tiny_patch16_224"
STEPS = {"erm": None, "last": "last"}


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("timm")
    return cost_by_size(MODEL, STEPS, batch=2, factors=(1 / 12, 1), device=MACHINE)


def test_each_axis_has_its_own_sizes(found):
    sizes = {axis: [] for axis in ("width", "depth", "tokens", "batch")}
    for one in found:
        sizes[one.axis].append(one.size)
    assert sizes == {
        "width": [128, 128, 192, 192],  # two heads at least
        "depth": [1, 1, 12, 12],
        "tokens": [17, 17, 197, 197],
        "batch": [1, 1, 2, 2],
    }


def test_the_model_as_it_is_is_part_of_every_axis(found):
    there = {
        (one.axis, one.step): one.cost
        for one in found
        if one.size == {"width": 192, "depth": 12, "tokens": 197, "batch": 2}[one.axis]
    }
    plain = dvf.cost(MODEL, batch=2, device=MACHINE)
    for (axis, step), cost in there.items():
        assert cost is there["width", step], axis
    assert there["width", "erm"].flops == plain.flops


def test_the_ratio_is_that_of_seconds(found):
    ratios = over_erm(found)
    seconds = {
        step: dvf.cost(MODEL, diversity, batch=2, device=MACHINE).seconds.step
        for step, diversity in STEPS.items()
    }
    assert ratios["depth", "last"][12] == pytest.approx(seconds["last"] / seconds["erm"])
    assert set(ratios["depth", "erm"].values()) == {1.0}
    with pytest.raises(dvf.UsageError, match="steps: expected one named erm"):
        over_erm([one for one in found if one.step == "last"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "no_such_vit"}, "model: expected a name of timm's"),
        ({"model": "resnet18"}, "does not take embed_dim"),
        ({"batch": 0}, "batch: expected"),
        ({"batch": 2**31, "axes": ("batch",), "factors": (2,)}, "batch: expected"),
        ({"factors": (0,)}, "factors: expected"),
        ({"factors": (1e300,)}, "factors: expected"),
        ({"axes": ("height",)}, "axes: expected"),
        ({"steps": {}}, "steps: expected"),
    ],
)
def test_one_line(options, said):
    pytest.importorskip("timm")
    given = {"model": MODEL, "steps": STEPS, "batch": 2, "factors": (1,), **options}
    model, steps = given.pop("model"), given.pop("steps")
    with pytest.raises((dvf.UsageError, dvf.UnsupportedError)) as raised:
        cost_by_size(model, steps, **given)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_processes_are_the_same_step():
    """What is asked of a cost that was counted is what a count for so many processes says."""
    one = dvf.cost(vit(), "last", batch=2, device=MACHINE)
    for parallel in ("ddp:4", "fsdp2:64"):
        again = dvf.cost(vit(), "last", batch=2, device=MACHINE, parallel=parallel)
        derived = one.with_parallel(parallel)
        assert (derived.peak, derived.sent_bytes) == (again.peak, again.sent_bytes)
        assert derived.seconds == again.seconds
    assert one.with_parallel("ddp:4").with_parallel(None).peak == one.peak
    assert one.with_parallel("ddp:4").samples_per_second == 4 * one.samples_per_second


def test_a_share_of_the_parameters_is_updated():
    one = dvf.cost(vit(), batch=2)
    many = one.with_parallel("fsdp2:8")
    update = sum(n * call.moved for call, n in one.calls.items() if call.phase == "optimizer")
    assert one.bytes_moved - many.bytes_moved == pytest.approx(7 / 8 * update, rel=0.01)
    assert one.with_parallel("ddp:8").bytes_moved == one.bytes_moved


def test_seconds_of_kinds_are_the_devices():
    found = dvf.cost(vit(), "all", batch=2, device=MACHINE)
    assert sum(found.kind_seconds.values()) == pytest.approx(found.seconds.device)
    assert found.kind_seconds["attention double backward"] > 0
    assert dvf.cost(vit(), batch=2, device=MACHINE).kind_seconds["penalty"] == 0
    slow = found.seconds._replace(communication=9.0)
    assert (found.seconds.limit, slow.limit) == ("device", "communication")


def test_the_command_on_gpus(capsys):
    for package in ("typer", "rich", "timm", "triton"):
        pytest.importorskip(package)
    args = (MODEL, "--batch", "2", "--layers", "erm", "--device", "H200", "--gpus", "8,1,64")
    code, said, _ = run(capsys, *args, "--json")
    assert code == 0
    rows = json.loads(said)["steps"]
    assert [(row["GPUs"], row["by"]) for row in rows] == [
        (1, "alone"),
        *((n, by) for n in (8, 64) for by in ("ddp", "fsdp2")),
    ]
    alone, ddp, fsdp = rows[0], rows[3], rows[4]
    assert ddp["samples per second"] == pytest.approx(128 / ddp["step seconds"])
    assert ddp["communication seconds"] > rows[1]["communication seconds"] > 0
    assert fsdp["peak bytes"] < alone["peak bytes"] < ddp["peak bytes"]
    assert alone["fits"] is True
    code, said, _ = run(capsys, *args)
    assert code == 0
    assert "samples/s" in said


def test_the_figure(capsys, tmp_path, monkeypatch):
    for package in ("typer", "rich", "timm", "matplotlib"):
        pytest.importorskip(package)
    few = {**cost_by_size.__kwdefaults__, "factors": (1 / 12, 1)}
    monkeypatch.setattr(cost_by_size, "__kwdefaults__", few)
    for ending in ("png", "svg"):
        path = tmp_path / f"cost.{ending}"
        args = (MODEL, "--batch", "12", "--layers", "erm,last", "--figure", str(path))
        code, _, err = run(capsys, *args)
        assert (code, err) == (0, "")
    data = (tmp_path / "cost.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > 2 * height > 600
    words = ElementTree.parse(tmp_path / "cost.svg").getroot()
    assert words.tag.endswith("svg")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--gpus", "0"), "gpus: expected numbers from 1"),
        (("--gpus", "8,-1"), "gpus: expected numbers"),
        (("--gpus", "999999999999"), "gpus: expected numbers"),
        (("--gpus", ""), "gpus: expected numbers"),
        (("--gpus", "8", "--device", "cpu"), "gpus: expected a GPU"),
        (("--gpus", "8", "--parallel", "ddp:8"), "parallel: expected none"),
        (("--calibrate",), "calibrate: expected cpu or cuda, got 'H200'"),
        (("--figure", "cost.pdf"), "figure: expected a name that ends in .png or .svg"),
        (("--figure", "cost"), "figure: expected a name"),
        (("--figure", "cost.png", "--layers", "erm"), "layers: expected a step with the penalty"),
    ],
)
def test_the_command_says_mistakes_in_one_line(capsys, args, said):
    pytest.importorskip("typer")
    pytest.importorskip("timm")
    small = (MODEL, "--batch", "2", "--layers", "erm", "--device", "H200", *args)
    code, _, err = run(capsys, *small)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
