"""The study of sizes: its tables are those of the page, and its predictions are still what is predicted."""

import json
import subprocess
import sys

import pytest

from tests.test_tree import ROOT
from tools.docs import scaling_study
from tools.docs.support import between

pytest.importorskip("timm")
ROWS = json.loads(scaling_study.RESULT.read_text("utf-8"))["rows"]


def test_the_page_shows_what_was_recorded():
    page = scaling_study.PAGE.read_text("utf-8")
    for name, table in scaling_study.tables().items():
        assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1
        assert between(page, name, table) == page


def test_what_was_recorded_is_what_is_predicted(tmp_path):
    """The command of the examples' page, with two small models, beside the recorded rows."""
    pytest.importorskip("triton")
    out = tmp_path / "study.json"
    command = [sys.executable, "examples/scaling_study.py", "--quick", "--json", str(out)]
    command += ["--figure", str(tmp_path / "study.png")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| ViT-S |") == 3 + 2 + 1
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text("utf-8"))["rows"]
    assert {row["model"] for row in found} == {"ViT-Ti", "ViT-S"}
    kept = {(row["model"], row["step"], row["by"]): row for row in ROWS}
    for row in found:
        recorded = kept[row["model"], row["step"], row["by"]]
        assert recorded["kinds"] == pytest.approx(row["kinds"], rel=1e-3)
        assert recorded["seconds"] == pytest.approx(row["seconds"], rel=1e-3)
        assert recorded["peak_bytes"] == row["peak_bytes"]


def test_measured_steps_are_those_of_the_records():
    measured = scaling_study.study().measured()
    assert {where for where, *_ in measured} == {"a CPU", "an H200"}
    assert {(model, step) for where, model, step, _ in measured if where == "a CPU"} == {
        (model, step) for model in ("ViT-Ti", "ViT-S", "ViT-B") for step in ("last", "all")
    }
    assert all(0.8 < ratio < 4 for *_, ratio in measured)
