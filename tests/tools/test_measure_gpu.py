"""The measurements of a borrowed GPU, tried on one that computes nothing: budget, resumption, failures."""

import json
import sys

import pytest
import torch

from benchmarks import headline, records
from benchmarks.critics import CRITICS
from tests.helpers.fake_gpu import run_on_fake_gpu
from tools.measure_gpu import __main__ as program
from tools.measure_gpu import measurements

GELU = "operator: gelu 197 bfloat16"


def test_rows_of_an_operator_have_device_and_host_time(tmp_path):
    results = tmp_path / "gpu.json"
    code = f"""
from pathlib import Path
from tools.measure_gpu.__main__ import main
arguments = ["--only", {GELU!r}, "--results", {str(results)!r}]
print(main(arguments))
before = Path({str(results)!r}).stat().st_mtime_ns
print(main(arguments), Path({str(results)!r}).stat().st_mtime_ns == before)
print(main([]))
"""
    printed = run_on_fake_gpu(code).splitlines()
    assert printed[-3:-1] == ["0", "0 True"]  # the second run had nothing left to measure
    assert printed[-1] == "1"  # the project's own results are refused
    (found,) = json.loads(results.read_text()).values()
    assert found["done"], found
    assert [(row["order"], row["implementation"]) for row in found["rows"]] == [
        (order, by)
        for order in ("fwd", "fwd+bwd", "fwd+bwd+double bwd")
        for by in ("ours", "eager")
    ]
    for row in found["rows"]:
        assert row["device_how"] == "graph of 20, L2 warm"
        assert row["host_seconds"] > 0
        assert row["bytes"] > 0
    with pytest.raises(records.ReportError, match="computes nothing; no results"):
        records.read(results)


def test_a_step_is_measured_by_everybody(tmp_path):
    pytest.importorskip("timm")
    code = """
import json
from benchmarks import headline
from tools.measure_gpu import measurements
known = [{"implementation": who} for who, one in headline.VARIANTS.items() if one.how == "compiled"]
print(json.dumps(list(measurements.step("DiverseViT last", known))))
"""
    rows = json.loads(run_on_fake_gpu(code).splitlines()[-1])
    assert [row["implementation"] for row in rows] == [
        "ours",
        "ours, CUDA graph",
        "eager one-pass",
        "eager one-pass, CUDA graph",
        "published loop",
        "stock ERM",
        "stock ERM, CUDA graph",
    ]
    assert not any("refused" in row for row in rows), rows
    host = {row["implementation"]: row["host_seconds"] for row in rows}
    assert 5 * host["ours, CUDA graph"] < host["ours"]
    assert all(row["peak_bytes"] > 0 and len(row["seconds"]) >= 5 for row in rows)


@pytest.fixture
def anywhere(monkeypatch):
    """A machine on which measuring is not refused."""
    monkeypatch.setattr(program, "refusal", lambda _: None)


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert program.main(["--results", str(tmp_path / "gpu.json")]) == 1
    assert capsys.readouterr().err == "measure_gpu: needs a GPU; there is none here\n"


def test_nothing_starts_that_there_is_no_time_for(tmp_path, monkeypatch, capsys, anywhere):
    monkeypatch.setattr(program, "measure", lambda *_: pytest.fail("started"))
    results = str(tmp_path / "gpu.json")
    assert program.main(["--minutes", "0.1", "--results", results]) == 3
    assert "budget is spent" in capsys.readouterr().out


STAND_IN = """
import json, sys, time
known = json.load(sys.stdin)
print("MACHINE", json.dumps({"device": "chip"}), flush=True)
for n in range(3):
    if {"n": n} in known:
        continue
    if n == 2 and not known:
        %s
    print("ROW", json.dumps({"n": n}), flush=True)
print("DONE", flush=True)
"""
"""A measurement of three rows, which does not reach the last at its first try."""


@pytest.mark.parametrize(
    ("ending", "state"), [("time.sleep(600)", "stopped"), ("sys.exit('why')", "failed")]
)
def test_what_ends_early_is_gone_on_with(ending, state, tmp_path, monkeypatch, anywhere):
    code = STAND_IN % ending
    monkeypatch.setattr(program, "command", lambda _: [sys.executable, "-c", code])
    monkeypatch.setattr(program, "SLACK_SECONDS", 0.0)
    results = tmp_path / "gpu.json"
    arguments = ["--only", GELU, "--results", str(results), "--minutes"]
    program.main([*arguments, "0.1"])
    found = json.loads(results.read_text())[GELU]
    assert found["rows"] == [{"n": 0}, {"n": 1}]
    assert state in found
    assert "done" not in found
    assert state == "stopped" or "why" in found["failed"]
    assert program.main([*arguments, "5"]) == 0
    found = json.loads(results.read_text())[GELU]
    assert found["rows"] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert found["done"]
    assert state not in found


def test_results_of_another_commit_are_measured_again(tmp_path, monkeypatch, anywhere):
    results = tmp_path / "gpu.json"
    old = {"commit": "another", "rows": [1], "done": True, "seconds": 1.0}
    results.write_text(json.dumps({GELU: old}))
    monkeypatch.setattr(
        program,
        "measure",
        lambda name, known, *_: {"rows": [len(known)], "done": True, "seconds": 2},
    )
    program.main(["--only", GELU, "--results", str(results)])
    found = json.loads(results.read_text())[GELU]
    assert (found["commit"], found["rows"]) == (measurements.commit(), [0])


def test_kernel_tests_come_first_and_every_kind_is_known():
    names = measurements.names()
    assert len(set(names)) == len(names)
    kinds = list(dict.fromkeys(name.partition(": ")[0] for name in names))
    assert kinds == [
        *("tests", "float16 misses", "operator", "published", "gradient penalty", "step"),
        *("largest batch", "autotuned"),
    ]
    assert set(kinds) == set(measurements.KINDS)


def test_models_and_layers_are_those_of_the_headline_steps():
    assert tuple(headline.MODELS) == measurements.MODELS
    assert measurements.LAYERS == headline.LAYERS
    assert tuple(CRITICS) == measurements.CRITICS


@pytest.mark.parametrize("name", [measurements.PUBLIC_ISSUE, "encoder-1024x256"])
def test_gradient_penalties_are_measured_by_everybody(name):
    code = f"""
import json
from benchmarks import critics
from tools.measure_gpu import measurements
one = critics.CRITICS["encoder-1024x256"]._replace(depth=1, side=32, batches={{"cuda": 2}})
critics.CRITICS["encoder-1024x256"] = one
print(json.dumps(list(measurements.gradient_penalty({name!r}, []))))
"""
    rows = json.loads(run_on_fake_gpu(code).splitlines()[-1])
    told = {(row["implementation"], row["dtype"]) for row in rows if "refused" not in row}
    issue = name == measurements.PUBLIC_ISSUE
    dtypes = ["float16"] if issue else ["float32", "bfloat16"]
    assert told == {(who, dtype) for who in ("ours", "SDPA math", "eager") for dtype in dtypes}
    assert all(row["host_seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)


class Memory:
    """Stands in for a GPU on which steps of more than so many images are out of memory."""

    def __init__(self, monkeypatch, limit: int):
        self.limit, self.asked = limit, []
        for name in ("make_model", "make_optimizer"):
            monkeypatch.setattr(headline, name, lambda *_: None)
        monkeypatch.setattr(headline, "make_batch", lambda _, n: n)
        monkeypatch.setattr(headline, "step_of", self.step_of)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def step_of(self, case, model, batch, optimizer):
        def step():
            if batch > self.limit:
                raise torch.cuda.OutOfMemoryError("no memory")

        self.asked.append((case.variant, batch))
        return step


def test_batches_are_tried_by_every_variant_and_known_ones_are_not(monkeypatch):
    memory = Memory(monkeypatch, 200)
    rows = list(measurements.largest_batch("ViT-S last", []))
    tried = {row["implementation"] for row in rows}
    assert tried == {who for who, one in headline.VARIANTS.items() if one.how != "compiled"}
    for who in tried:
        trials = {row["batch"]: row["fits"] for row in rows if row["implementation"] == who}
        assert 194 <= headline.largest(trials) <= 200
        assert headline.next_batch(trials, 64) is None
    memory.asked.clear()
    assert list(measurements.largest_batch("ViT-S last", rows[:5])) == rows[5:]
    assert len(memory.asked) == len(rows) - 5


def test_a_search_survives_the_end_of_its_process(monkeypatch):
    """An error of the device leaves nothing to go on with: the trial counts as failed, and the next process goes on."""
    memory = Memory(monkeypatch, 200)

    def fits(case, model, batch):
        memory.asked.append(batch)
        if batch > memory.limit:
            raise torch.AcceleratorError("lost")
        return True

    monkeypatch.setattr(headline, "fits", fits)
    rows = measurements.largest_batch("ViT-S last", [])
    known = [next(rows) for _ in range(3)]
    with pytest.raises(torch.AcceleratorError):
        next(rows)
    assert [(row["batch"], row["fits"]) for row in known] == [(64, True), (128, True), (256, False)]
    assert known[-1]["why"].endswith("lost")
    after = next(measurements.largest_batch("ViT-S last", known))
    assert (after["batch"], after["fits"]) == (192, True)


def test_a_variant_that_fails_is_left_with_its_reason(monkeypatch):
    memory = Memory(monkeypatch, 200)

    def step_of(case, *rest):
        if case.variant == "published loop":
            raise ValueError("why\nmore")
        return memory.step_of(case, *rest)

    monkeypatch.setattr(headline, "step_of", step_of)
    rows = list(measurements.largest_batch("ViT-S last", []))
    (failed,) = [row for row in rows if row["implementation"] == "published loop"]
    assert failed["failed"] == "ValueError: why"
    assert {row["implementation"] for row in rows} >= {"ours", "stock ERM, CUDA graph"}
    assert not list(measurements.largest_batch("ViT-S last", rows))
