"""Measuring a machine: how often, of what, and what becomes of it; on a GPU with stand-ins, since none is there."""

import json

import pytest
import torch

import diversevit_fast as dvf
from diversevit_fast.cost import calibration, clocks
from diversevit_fast.cost.devices import device_of
from tests.cost.test_counting import vit
from tests.cost.test_predict import MACHINE
from tests.helpers.fake_gpu import json_from_fake_gpu

SMALL = calibration.Sizes(1, 1 << 10)


class Ticking:
    """A clock on which a job takes ten microseconds, and one of a higher order longer."""

    def __init__(self):
        self.jobs = 0

    def seconds(self, job):
        job()
        self.jobs += 1
        return 1e-5 * (1 + self.jobs % 3)


@pytest.fixture(scope="module")
def measured():
    clock = Ticking()
    return calibration.calibrate(clock=clock, sizes=SMALL), clock


def test_a_bounded_number_of_jobs(measured):
    """Three dtypes with a product and 17 steps of operators each, bandwidth, and a call."""
    assert measured[1].jobs == 3 * (1 + 17) + 2


def test_a_job_has_a_bounded_number_of_rounds(monkeypatch):
    for seconds, rounds in ((0.01, clocks.ROUNDS), (0.4, 3), (20.0, 1)):
        now, ran = [0.0], []

        def job(seconds=seconds, now=now, ran=ran):
            now[0] += seconds
            ran.append(now[0])

        clock = clocks.CpuClock()
        monkeypatch.setattr(clock, "_now", lambda now=now: now[0])
        assert clock.seconds(job) == pytest.approx(seconds)
        assert len(ran) == 1 + rounds


def test_every_dtype_has_rates(measured, tmp_path):
    device = measured[0]
    assert set(device.rates) == {"float32", "bfloat16", "float16"}
    for dtype in device.rates:
        found = {key.removesuffix(f" {dtype}") for key in device.shares if key.endswith(dtype)}
        assert found >= {
            *("attention forward", "attention backward", "attention double backward"),
            *("penalty", "layer_norm_double_backward", "gelu_double_backward"),
        }
    again = calibration.load(calibration.save(device, tmp_path / "c.json"))
    assert (again.rates, again.shares) == (device.rates, device.shares)
    assert again.identity == calibration.identity()
    step = dvf.cost(vit(), "all", batch=2, dtype=torch.float16, device=again)
    assert 0 < step.seconds.step < 1e6


def test_a_calibration_without_float16_is_still_read(tmp_path):
    path = calibration.save(MACHINE, tmp_path / "c.json")
    assert set(calibration.load(path).rates) == {"float32", "bfloat16"}


def test_one_line(monkeypatch, tmp_path):
    with pytest.raises(dvf.UsageError, match="calibrate: expected cpu or cuda, got 'H200'"):
        calibration.calibrate("H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(dvf.UsageError, match="calibrate: expected a GPU"):
        calibration.calibrate("cuda")
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path)
    with pytest.raises(dvf.UsageError, match="device: expected a GPU that was measured"):
        device_of("cuda")


def test_a_gpu():
    """Products, bandwidth, calls and GELU of a GPU that computes nothing, by events around graphs, and kept."""
    found = json_from_fake_gpu("""
import json, tempfile, torch, warnings
warnings.simplefilter("ignore")
from benchmarks.fake_gpu.counters import counting
from diversevit_fast.cost import calibration, clocks
from diversevit_fast.ops import gelu
class Ticks:
    def __init__(self, **_): pass
    def record(self): Ticks.now = getattr(Ticks, "now", 0) + 5.0; self.at = Ticks.now
    def synchronize(self): pass
    def elapsed_time(self, end): return end.at - self.at
torch.cuda.Event = Ticks
def few(dtype, sizes):
    y = torch.randn(2, 4, 64, dtype=dtype).requires_grad_()
    yield calibration._orders(lambda: gelu(y), (y,))[:2]
calibration._jobs = few
calibration._DTYPES = {name: calibration._DTYPES[name] for name in ("float32", "bfloat16")}
device = calibration.calibrate("cuda", sizes=calibration.Sizes(1, 1 << 10))
with tempfile.NamedTemporaryFile() as file:
    again = calibration.load(calibration.save(device, file.name), "cuda")
print(json.dumps({"rates": device.rates, "shares": device.shares, "memory": device.memory,
    "host": [device.host, device.host_operator], "launch": device.launch,
    "architecture": device.architecture, "same": again.shares == device.shares,
    "gpu": again.is_gpu, "name": device.identity["gpu"]}))
""")
    assert found["architecture"] == "sm_90"
    assert found["gpu"]
    assert found["same"]
    assert "H200" in found["name"]
    seconds = 5e-3 / clocks.GpuClock.repeats  # as the stand-in for events says of each graph
    assert found["rates"]["float32"] == pytest.approx(2 * 2 * 197 * 384 * 1536 / seconds)
    assert found["launch"] == pytest.approx(seconds / 1000)
    assert any(key.startswith("gelu") and key.endswith("bfloat16") for key in found["shares"])
    assert 0 < found["host"][0] < found["host"][1]


@pytest.mark.parametrize("broken", ["architecture", "host", "host_operator"])
def test_a_gpus_calibration_needs_its_own_numbers(broken, tmp_path):
    content = json.loads(calibration.save(MACHINE, tmp_path / "c.json").read_text())
    content |= {"architecture": "sm_90", "host": 1e-6, "host_operator": 2e-6}
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="measured on another machine"):
        assert calibration.load(tmp_path / "c.json", "cuda").architecture == "sm_90"
    del content[broken]
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(dvf.UsageError, match="expected a calibration"):
        calibration.load(tmp_path / "c.json", "cuda")
