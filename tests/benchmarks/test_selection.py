"""Tests of the benchmark of head selection: it compares the same scores, and stores what it prints."""

import json

import pytest

from benchmarks import timing
from benchmarks.scripts import selection


def test_rows_and_file(monkeypatch, tmp_path, capsys):
    """timm's test_vit has two heads: three choices."""
    pytest.importorskip("timm")
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    assert selection.main(["--model", "test_vit", "--batch", "2", "--rounds", "2"]) == 0
    stored = json.loads((tmp_path / "selection.json").read_text())
    assert (stored["choices"], stored["batch"]) == (3, 2)
    assert set(stored["rows"]) == {"keep_heads", "select_heads"}
    assert stored["rows"]["keep_heads"]["ratio"] == 1.0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "selection.json")


def test_scores_that_differ_are_no_result(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr(selection, "one_by_one", lambda *_: {})
    with pytest.raises(RuntimeError, match="disagree"):
        selection.main(["--model", "test_vit", "--batch", "2"])
