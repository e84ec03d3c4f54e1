"""Tests of the memory benchmark: it measures what is in use, in a process of its own, and stores what it prints."""

import json
from pathlib import Path

import pytest

from benchmarks import timing
from benchmarks.scripts import memory
from benchmarks.scripts.memory import ATTENTION, MEASURES, ROWS, STEP, Size

TINY = Size(batch=2, tokens=1025, tiny=True)
RECORDED = Path(__file__).parents[2] / "benchmarks/results/memory.json"


def test_attention_of_eager_keeps_scores_and_ours_none():
    """At 1025 tokens a matrix of scores of 12 heads has 48 MiB, and q 3."""
    ours, eager = (
        memory.peak(ATTENTION, name, TINY, MEASURES["peak"]) for name in ("ours", "eager")
    )
    scores = 12 * 1025**2 * 4
    assert eager > 4 * scores
    assert ours < scores


def test_a_step_is_measured_without_what_it_leaves(monkeypatch):
    pytest.importorskip("timm")
    made = []

    class Watched(memory.StepWorkload):
        def __init__(self, spec):
            super().__init__(spec)
            made.append(self.model)

    monkeypatch.setattr(memory, "StepWorkload", Watched)
    job = memory.job_of(STEP, "ours", TINY)
    (model,) = made
    seen = []
    model.patch_embed.proj.weight.register_hook(lambda grad: seen.append(float(grad.norm())))
    job()
    assert seen[0] > 0
    assert all(p.grad is None for p in model.parameters())


def test_a_process_that_fails_is_one_line():
    with pytest.raises(RuntimeError, match=r"^attention, nobody: StopIteration$"):
        memory.peak(ATTENTION, "nobody", TINY, {})


def test_table_and_file_hold_every_row(monkeypatch, tmp_path, capsys):
    asked = []

    def peak(workload, name, size, environment):
        asked.append((workload, name, size, dict(environment)))
        first = name == ROWS[workload][0]
        return (2 << 20) * (1 if first else 3) * (1 if environment else 4)

    monkeypatch.setattr(memory, "peak", peak)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    assert memory.main(["--batch", "2", "--tokens", "1025", "--tiny"]) == 0
    pairs = [(workload, name) for workload, names in ROWS.items() for name in names]
    environments = list(MEASURES.values())
    assert asked == [(*pair, TINY, env) for env in environments for pair in pairs]
    stored = json.loads((tmp_path / "memory.json").read_text())
    assert stored["peak"][STEP] == {"erm": 2 << 20, "ours": 6 << 20, "eager": 6 << 20}
    assert stored["resident"][ATTENTION] == {"eager": 8 << 20, "ours": 24 << 20}
    assert (stored["batch"], stored["tokens"], stored["tiny"]) == TINY
    header, *lines, path = capsys.readouterr().out.splitlines()
    assert header.split() == ["peak", "MiB", "ratio", "resident", "MiB", "ratio"]
    assert lines[1].split() == ["all-layers", "step", "ours", "6", "3.00", "24", "3.00"]
    assert len(lines) == len(pairs)
    assert path == str(tmp_path / "memory.json")


def test_the_recorded_file_is_of_this_program():
    stored = json.loads(RECORDED.read_text())
    assert {
        "batch": stored["batch"],
        "tokens": stored["tokens"],
        "tiny": stored["tiny"],
    } == Size()._asdict()
    for measure in MEASURES:
        assert {w: tuple(found) for w, found in stored[measure].items()} == ROWS
        assert all(n > 0 for found in stored[measure].values() for n in found.values())
