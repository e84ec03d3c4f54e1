"""Times, data parallelism, the largest batch, calibrations, and the command."""

import csv
import json
from dataclasses import replace

import pytest

import diversevit_fast as dvf
from diversevit_fast.cost import calibration
from diversevit_fast.cost.counting import ELEMENTWISE, PRODUCTS
from diversevit_fast.cost.devices import DEVICES, Device
from tests.cost.test_counting import vit

MACHINE = Device(
    *("mine", None, {"float32": 1e11, "bfloat16": 2e11}, 1e10),
    shares={PRODUCTS: 0.5, ELEMENTWISE: 0.5},
    launch=1e-6,
    host=0.0,
    host_operator=0.0,
    identity=calibration.identity(),
)


def test_seconds_follow_the_rates():
    slow = dvf.cost(vit(), batch=2, device=MACHINE).seconds.device
    faster = {"float32": 2e11, "bfloat16": 4e11}
    fast = replace(MACHINE, rates=faster, bandwidth=2e10, launch=5e-7)
    assert dvf.cost(vit(), batch=2, device=fast).seconds.device == pytest.approx(slow / 2)


def test_a_graph_spares_the_host():
    pytest.importorskip("triton")
    plain, graph = (dvf.cost(vit(), batch=2, device="H200", graph=g) for g in (False, True))
    assert graph.seconds.host == 0 < plain.seconds.host
    assert plain.seconds.step == plain.seconds.host  # small kernels: the host is what takes time
    assert graph.seconds.step == graph.seconds.device == plain.seconds.device


def test_what_is_sent():
    model = vit()
    size = 4 * sum(p.numel() for p in model.parameters())
    ddp, fsdp = (dvf.cost(model, batch=2, parallel=f"{kind}:4") for kind in ("ddp", "fsdp2"))
    assert ddp.sent_bytes == {"all-reduce": 1.5 * size}
    whole, blocks = (
        sum(-(-len(p) // 4) * 4 * p[0].numel() * 4 for p in m.parameters())  # first axes filled up
        for m in (model, model.blocks)
    )
    gathered = 0.75 * (whole + blocks)  # for the forward, and again those of blocks
    assert fsdp.sent_bytes == {"all-gather": gathered, "reduce-scatter": 0.75 * whole}
    assert fsdp.collectives == {"all-gather": 5, "reduce-scatter": 3}
    one = dvf.cost(model, batch=2)
    assert ddp.peak_bytes == one.peak_bytes + size
    assert fsdp.peak.parts["optimizer state"] < 0.3 * one.peak.parts["optimizer state"]


def test_the_largest_batch_is_the_largest():
    found = dvf.cost(vit(), "last", batch=1)
    limit = dvf.cost(vit(), "last", batch=200).peak_bytes
    assert found.largest_batch(limit) == 200
    assert found.largest_batch(1000) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "TPU"}, "device: expected one of cpu, cuda, A100"),
        ({"device": 3}, "device: expected a Device"),
        ({"device": replace(MACHINE, bandwidth=-1.0)}, "positive rate of bandwidth"),
        ({"device": replace(MACHINE, rates={})}, "positive rate of float32, got none"),
        ({"device": replace(MACHINE, shares={PRODUCTS: 1.0})}, "positive rate of elementwise"),
        ({"parallel": "ddp"}, "parallel: expected ddp:N"),
        ({"parallel": "fsdp2:0"}, "parallel: expected"),
    ],
)
def test_one_line(options, said):
    with pytest.raises(dvf.UsageError, match=said):
        dvf.cost(vit(), batch=2, **options)
    for memory in (0, float("inf"), float("nan")):
        with pytest.raises(dvf.UsageError, match="memory"):
            dvf.cost(vit(), batch=2).largest_batch(memory)


def test_a_calibration_is_kept(tmp_path):
    path = calibration.save(MACHINE, tmp_path / "c.json")
    assert calibration.load(path).rates == MACHINE.rates
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "identity": {"processor": "another"}}))
    with pytest.warns(UserWarning, match="measured on another machine"):
        calibration.load(path)
    for broken in (
        {**content, "bandwidth": -1},
        {**content, "rates": {"float32": 1e9}},
        {**content, "shares": {}},
        {**content, "launch": "fast"},
        {},
        [],
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(dvf.UsageError, match="expected a calibration"):
            calibration.load(path)


def test_shipped_machines_name_their_sources():
    for device in DEVICES.values():
        assert "data sheet" in device.source
        assert device.rates["bfloat16"] > device.rates["float32"] > 0


def run(capsys, *args):
    from diversevit_fast.experiment.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["cost", *args])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_command(capsys, tmp_path):
    for package in ("typer", "rich", "timm"):
        pytest.importorskip(package)
    small = ("vit_tiny_patch16_224", "--batch", "2", "--layers", "erm,0/-1", "--device", "H200")
    out = str(tmp_path / "rows.csv")
    code, said, _ = run(capsys, *small, "--json", "--out", out)
    assert code == 0
    steps = json.loads(said)["steps"]
    assert [step["step"] for step in steps] == ["erm", "0/-1"]
    assert 0 < steps[0]["step seconds"] < steps[1]["step seconds"]
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["peak bytes"]) == steps[1]["peak bytes"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--batch", "0"), "batch: expected"),
        (("--device", "TPU"), "device: expected one of"),
        (("--layers", "first"), "layers: expected"),
        (("--memory", "-1"), "memory: expected"),
        (("--memory", "inf"), "memory: expected"),
        (("no_such_vit",), "model: expected"),
        (("vit_tiny_patch16_224.no_such_tag",), "Invalid pretrained tag (no_such_tag)"),
    ],
)
def test_the_command_says_mistakes_in_one_line(capsys, args, said):
    pytest.importorskip("typer")
    code, _, err = run(capsys, *args)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
