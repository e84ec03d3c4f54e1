"""The measurements of a borrowed GPU, tried on one that computes nothing: budget, resumption, failures."""

import json

import pytest

from tests.helpers.fake_gpu import run_on_fake_gpu
from tools.measure_gpu import __main__ as program
from tools.measure_gpu import measurements

GELU = "operator: gelu 197 bfloat16"


def test_rows_of_an_operator_have_device_and_host_time(tmp_path):
    results = tmp_path / "gpu.json"
    code = f"""
from pathlib import Path
from tools.measure_gpu.__main__ import main
arguments = ["--only", {GELU!r}, "--unchecked", "--results", {str(results)!r}]
print(main(arguments))
before = Path({str(results)!r}).stat().st_mtime_ns
print(main(arguments), Path({str(results)!r}).stat().st_mtime_ns == before)
"""
    printed = run_on_fake_gpu(code).splitlines()
    assert printed[-2:] == ["0", "0 True"]  # the second run had nothing left to measure
    (found,) = json.loads(results.read_text()).values()
    assert "failed" not in found, found
    assert found["checked"] is False
    assert [(row["order"], row["by"]) for row in found["rows"]] == [
        (order, by)
        for order in ("fwd", "fwd+bwd", "fwd+bwd+double bwd")
        for by in ("ours", "eager")
    ]
    assert all(row["how"] == "graph" and row["host_us"] > 0 for row in found["rows"])


def test_nothing_starts_that_there_is_no_time_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "measure", lambda *_: pytest.fail("started"))
    results = str(tmp_path / "gpu.json")
    assert program.main(["--minutes", "0.1", "--results", results]) == 3
    assert "budget is spent" in capsys.readouterr().out


def test_a_failure_is_kept_and_tried_again(tmp_path, monkeypatch):
    tries = []

    def measure(name, unchecked, seconds):
        tries.append(name)
        return {"failed": "why"} if len(tries) == 1 else {"rows": []}

    monkeypatch.setattr(program, "measure", measure)
    results = tmp_path / "gpu.json"
    arguments = ["--only", GELU, "--results", str(results)]
    program.main(arguments)
    assert json.loads(results.read_text())[GELU]["failed"] == "why"
    for _ in range(2):
        program.main(arguments)
    assert "failed" not in json.loads(results.read_text())[GELU]
    assert len(tries) == 2


def test_results_of_another_commit_are_measured_again(tmp_path, monkeypatch):
    results = tmp_path / "gpu.json"
    results.write_text(json.dumps({GELU: {"commit": "another", "rows": []}}))
    monkeypatch.setattr(program, "measure", lambda *_: {"rows": [1]})
    program.main(["--only", GELU, "--results", str(results)])
    found = json.loads(results.read_text())[GELU]
    assert found == {"commit": measurements.commit(), "rows": [1]}


def test_kernel_tests_come_first_and_every_name_is_known():
    names = measurements.names()
    assert names[0].startswith("tests: ")
    assert len(set(names)) == len(names)
    assert {name.partition(":")[0] for name in names} == {"tests", "step", "operator", "autotuned"}
