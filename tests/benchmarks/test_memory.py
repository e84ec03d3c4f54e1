"""Tests of the memory benchmark: it measures what is in use, in a process of its own, and stores what it prints."""

import json
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

from benchmarks import timing
from benchmarks.scripts import memory
from benchmarks.scripts.memory import ATTENTION, CHECKPOINTS, MASK, MEASURES, ROWS, STEP, Size

TINY = Size(batch=2, tokens=1025, tiny=True)
RECORDED = Path(__file__).parents[2] / "benchmarks/results"


def test_attention_of_eager_keeps_scores_and_ours_none():
    """At 1025 tokens a matrix of scores of 12 heads has 48 MiB, and q 3."""
    (ours, seconds), (eager, _) = (
        memory.measured(ATTENTION, name, TINY, MEASURES["peak"]) for name in ("ours", "eager")
    )
    assert seconds > 0
    scores = 12 * 1025**2 * 4
    assert eager > 4 * scores
    assert ours < scores


def test_a_trained_mask_is_kept_once_and_eager_keeps_scores_of_all_heads():
    """Its gradients of both orders have its own size, 4 MiB at 1025 tokens; a matrix of scores 12 times that."""
    ours, eager = (
        memory.measured(MASK, name, TINY, MEASURES["peak"])[0] for name in ("ours", "eager")
    )
    mask = 1025**2 * 4
    assert eager > 4 * 12 * mask
    assert ours < 12 * mask


@pytest.mark.parametrize("workload", [name for name in ROWS if name not in (STEP, ATTENTION, MASK)])
def test_every_row_of_steps_leaves_no_gradient(workload, monkeypatch):
    pytest.importorskip("timm")
    made = []
    plain = memory._without_gradients
    monkeypatch.setattr(
        memory, "_without_gradients", lambda model, job: made.append(model) or plain(model, job)
    )
    for name in ROWS[workload]:
        job = memory.job_of(workload, name, TINY)
        seen = []
        next(made[-1].parameters()).register_hook(lambda grad, seen=seen: seen.append(grad))
        job()
        assert seen
        assert all(p.grad is None for p in made[-1].parameters())


def test_checkpoints_are_there_where_the_row_says_so(monkeypatch):
    pytest.importorskip("timm")
    ran = []
    plain = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "torch.utils.checkpoint.checkpoint", lambda *a, **k: ran.append(1) or plain(*a, **k)
    )
    counts = {}
    for name in ROWS[CHECKPOINTS]:
        ran.clear()
        memory.job_of(CHECKPOINTS, name, TINY)()
        counts[name] = len(ran)
    assert [bool(n) for n in counts.values()] == [False, True] * 3, counts


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
        memory.measured(ATTENTION, "nobody", TINY, {})


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What processes were asked for, where none runs: ours takes thrice what the first does."""
    calls = []

    def measured(workload, name, size, environment):
        calls.append((workload, name, size, dict(environment)))
        first = name == ROWS[workload][0]
        return (2 << 20) * (1 if first else 3) * (1 if environment else 4), 1.5

    monkeypatch.setattr(memory, "measured", measured)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    return calls


SMALL = ["--batch", "2", "--tokens", "1025", "--tiny"]


def test_table_and_file_hold_every_row(asked, tmp_path, capsys):
    assert memory.main(SMALL) == 0
    peak, resident = MEASURES.values()
    assert asked == [
        (workload, name, TINY, env)
        for workload, names in ROWS.items()
        for env in ((peak, resident) if workload in memory.RESIDENT else (peak,))
        for name in names
    ]
    stored = json.loads((tmp_path / "memory.json").read_text())
    assert stored["peak"][STEP] == {"erm": 2 << 20, "ours": 6 << 20, "eager": 6 << 20}
    assert stored["resident"][ATTENTION] == {"eager": 8 << 20, "ours": 24 << 20}
    assert stored["seconds"][ATTENTION] == {"eager": 1.5, "ours": 1.5}
    assert (stored["batch"], stored["tokens"], stored["tiny"]) == TINY
    header, *lines, path = capsys.readouterr().out.splitlines()
    assert header.split() == ["seconds", "peak", "MiB", "ratio", "resident", "MiB", "ratio"]
    assert lines[1].split() == ["all-layers", "step", "ours", "1.5", "6", "3.00", "24", "3.00"]
    assert len(lines) == sum(map(len, ROWS.values()))
    assert path == str(tmp_path / "memory.json")


def test_one_workload_alone_leaves_the_others(asked, tmp_path, capsys):
    path = tmp_path / "memory.json"
    assert memory.main([*SMALL, "--workload", MASK]) == 0
    assert memory.main([*SMALL, "--workload", STEP]) == 0
    assert set(json.loads(path.read_text())["peak"]) == {MASK, STEP}
    assert {workload for workload, *_ in asked} == {MASK, STEP}
    before = path.read_text()
    asked.clear()
    assert memory.main([*SMALL[:2], "--workload", STEP]) == 1  # other sizes
    assert "leave --workload out" in capsys.readouterr().err
    assert (asked, path.read_text()) == ([], before)


def test_another_file_holds_what_another_machine_measured(asked, tmp_path):
    assert memory.main([*SMALL, "--workload", MASK]) == 0
    assert memory.main([*SMALL, "--workload", CHECKPOINTS, "--out", "others"]) == 0
    for name, workload in (("memory", MASK), ("others", CHECKPOINTS)):
        assert set(json.loads((tmp_path / f"{name}.json").read_text())["peak"]) == {workload}


@pytest.mark.parametrize(
    ("name", "workloads"),
    [("memory", ROWS.keys() - {CHECKPOINTS}), ("checkpointed_step", {CHECKPOINTS})],
)
def test_the_recorded_files_are_of_this_program(name, workloads):
    stored = json.loads((RECORDED / f"{name}.json").read_text())
    assert {key: stored[key] for key in Size._fields} == Size()._asdict()
    measures = [what for what in MEASURES if what in stored]
    for measure in measures:
        assert {w: tuple(found) for w, found in stored[measure].items()}.items() <= ROWS.items()
    assert stored["peak"].keys() <= workloads
    assert set(stored.get("resident", ())) == workloads & set(memory.RESIDENT)
    assert {MASK, CHECKPOINTS} & workloads <= stored["seconds"].keys()
    for what in (*measures, "seconds"):
        assert all(n > 0 for found in stored[what].values() for n in found.values())
