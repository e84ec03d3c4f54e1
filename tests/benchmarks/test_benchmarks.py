"""Tests of the benchmarks: checks bite, rounds interleave, reports hold the recorded numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import critics, records, report, steps
from benchmarks.cases import all_cases, critic_cases, operator_cases, step_cases
from benchmarks.orders import BWD, DOUBLE_BWD, FWD
from benchmarks.registry import IMPLEMENTATIONS, Implementation
from benchmarks.runner import (
    Case,
    ReplayClock,
    Runner,
    checked,
    interleaved,
    peak_bytes,
    workload_of,
)

ROOT = Path(__file__).parents[2]
TINY = [case for case in all_cases(tiny=True) if not case.implementation.compiled]
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_every_row_runs_and_passes_its_check(case):
    if case.spec.workload == "all-layers step" or getattr(case.spec, "critic", "") == "ViT-S":
        pytest.importorskip("timm")
    workload = workload_of(case.spec)
    if reason := case.implementation.missing(workload.like):
        pytest.skip(reason)
    checked(workload, case.implementation)


@pytest.mark.slow
def test_the_compiled_row_runs_and_passes_its_check():
    (case,) = [
        c
        for c in operator_cases("attention", dtypes=[torch.float32], tiny=True)
        if c.implementation.compiled
    ]
    workload = workload_of(case.spec)
    if reason := case.implementation.missing(workload.like):
        pytest.skip(reason)
    checked(workload, case.implementation)


def row_of(operator: str, order: str) -> Case:
    rows = operator_cases(operator, dtypes=[torch.float32], tiny=True)
    return next(c for c in rows if c.spec.order == order and c.implementation.name == "ours")


WRONG = {
    "scaled": lambda f: lambda *x: f(*x) * 1.001,
    "one element": lambda f: lambda *x: f(*x) + torch.eye(f(*x).shape[-1])[0] * 1e-3 * x[0].sum(),
    "no second order": lambda f: lambda *x: f(*x).detach() + sum((y - y.detach()).sum() for y in x),
    "not finite": lambda f: lambda *x: f(*x).log(),
}


@pytest.mark.parametrize("operator", ["attention", "layer_norm", "gelu"])
@pytest.mark.parametrize("order", [BWD, DOUBLE_BWD])
@pytest.mark.parametrize("how", WRONG)
def test_the_check_bites(operator, order, how):
    case = row_of(operator, order)
    wrong = replace(case.implementation, function=WRONG[how](case.implementation.function))
    workload = workload_of(case.spec)
    checked(workload, case.implementation)
    with pytest.raises(AssertionError):
        checked(workload, wrong)


@pytest.mark.parametrize("missing", range(4), ids=["gq", "gk", "gv", "gdo"])
def test_the_check_wants_every_result(missing):
    case = row_of("attention", DOUBLE_BWD)
    workload = workload_of(case.spec)
    results = list(workload.job(case.implementation)())
    workload.check(case.implementation, tuple(results))
    with pytest.raises(ValueError, match="zip"):
        workload.check(case.implementation, tuple(results[:3]))
    results[missing] = torch.zeros_like(results[missing])
    with pytest.raises(AssertionError, match="exceeds budget"):
        workload.check(case.implementation, tuple(results))


def test_the_check_of_steps_bites(monkeypatch):
    (ours, *_) = step_cases("paper step", tiny=True)
    workload = workload_of(ours.spec)
    checked(workload, ours.implementation)
    losses = steps.STEPS["paper step"]
    assert losses["ours"][1] is losses["published loop"][0]
    monkeypatch.setitem(losses, "ours", (losses["erm"][0], losses["ours"][1]))
    with pytest.raises(AssertionError, match="ours"):
        checked(workload, ours.implementation)


@pytest.mark.parametrize("wrong", ["no penalty", "no second order"])
def test_the_check_of_r1_steps_bites(monkeypatch, wrong):
    (ours, *_) = critic_cases(["encoder-1024x256"], tiny=True)
    workload = workload_of(ours.spec)
    checked(workload, ours.implementation)

    def loss_of(critic):
        right = critics.r1("SDPA math")(critic)

        def loss(images, labels):
            if wrong == "no penalty":
                return F.softplus(-critic(images)).mean()
            plain = F.softplus(-critic(images)).mean()
            return plain + (right(images, labels) - plain).detach()

        return loss

    losses = steps.STEPS["R1 step"]
    monkeypatch.setitem(losses, "ours", (loss_of, losses["ours"][1]))
    with pytest.raises(AssertionError, match="ours"):
        checked(workload, ours.implementation)


def test_what_a_critic_runs_in_is_what_the_row_says(monkeypatch):
    """Ours, PyTorch's composite, or products and a softmax of their own."""
    model, images = critics.Encoder(64, 1, 1, 32), torch.rand(1, 3, 32, 32)

    def calls(name: str) -> set[str]:
        with torch.profiler.profile() as seen:
            critics.r1(name)(model)(images, images)
        return {event.name for event in seen.events()}

    ours, math, eager = (calls(name) for name in ("ours", "SDPA math", "eager"))
    assert any(name.startswith("diversevit::attention") for name in ours)
    assert "aten::_scaled_dot_product_attention_math" in math - eager
    assert "aten::softmax" in eager
    assert not any(name.startswith("diversevit::") for name in math | eager)


def test_a_wrong_implementation_has_no_number_and_the_others_do():
    case = row_of("gelu", FWD)
    wrong = Case(case.spec, Implementation("wrong", torch.relu))
    runner = Runner({case.spec.group: [case, wrong]}, rounds=3)
    with pytest.raises(AssertionError):
        runner.outcome(wrong)
    found = runner.outcome(case)
    assert len(found.seconds) == 3
    assert all(taken > 0 for taken in found.seconds)


def test_first_order_implementations_have_no_second_order_row():
    for case in TINY:
        assert not (case.implementation.first_order_only and case.spec.order == DOUBLE_BWD)
    assert any(p.first_order_only for p in IMPLEMENTATIONS["attention"])


def test_rounds_interleave_after_a_warm_up():
    order = []
    jobs = {name: lambda name=name: order.append(name) for name in "xy"}
    seconds = interleaved(jobs, 2)  # pyright: ignore[reportArgumentType]
    assert order == ["x", "y"] * 3
    assert [len(taken) for taken in seconds.values()] == [2, 2]


def test_recorded_seconds_are_replayed():
    clock = ReplayClock()
    clock.load([1.5, 2.5])
    assert [clock() for _ in range(4)] == [0.0, 1.5, 0.0, 2.5]
    assert clock() == 0.0


def test_peak_memory_is_what_a_job_takes():
    def job(n: int):
        return lambda: torch.ones(n << 18).sum()  # n MiB

    peaks = [peak_bytes(job(n), CPU) for n in (8, 64)]
    if None in peaks:
        pytest.skip("no /proc/self/clear_refs here")
    assert peaks[0] == pytest.approx(8 << 20, abs=4 << 20)
    assert peaks[1] == pytest.approx(64 << 20, abs=4 << 20)


def recorded(**changes) -> dict:
    """A pytest-benchmark file of two implementations and three rounds."""

    def row(name: str, data: list[float], first_order_only: bool = False) -> dict:
        info = {
            **{"workload": "gelu", "implementation": name, "order": FWD, "device": "chip"},
            **{"first_order_only": first_order_only, "peak_bytes": 3 << 20, "torch": "2"},
        }
        return {"group": "gelu 2x3 float32 fwd", "stats": {"data": data}, "extra_info": info}

    rows = [row("ours", [0.001, 0.002, 0.004]), row("eager", [0.003, 0.004, 0.012], True)]
    rows[1]["extra_info"].update(changes)
    return {"benchmarks": rows}


def stored(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "chip.json"
    path.write_text(json.dumps(content))
    return path


def test_the_table_holds_the_recorded_numbers(tmp_path):
    text = report.markdown(records.read(stored(tmp_path, recorded())))
    assert "| 2x3 float32 fwd | ours | 2 ms | 1.4 - 3.2 | 1.00 | 3.0 MiB |" in text
    # the ratio is the median over rounds, 3, and not the ratio of medians, 2
    assert (
        "| 2x3 float32 fwd | eager (first order only) | 4 ms | 3.4 - 8.8 | 3.00 | 3.0 MiB |" in text
    )
    assert "3 interleaved rounds" in text
    assert "device chip" in text


def test_compile_time_is_told(tmp_path):
    text = report.markdown(records.read(stored(tmp_path, recorded(compile_seconds=21.4))))
    assert "(compiled in 21 s)" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "no results of benchmarks"),
        ({"benchmarks": []}, "holds no row"),
        (recorded(device="another"), "different conditions"),
    ],
    ids=["other JSON", "empty", "two machines"],
)
def test_what_cannot_be_reported_is_one_line(tmp_path, capsys, content, said):
    assert report.main([str(stored(tmp_path, content))]) == 1
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert not out


def test_a_report_leaves_a_compact_file(tmp_path, capsys):
    """A row per line with what tables show, from which the same tables are made."""
    raw = recorded(compile_seconds=21.4)
    raw["benchmarks"][0]["stats"] |= {"mean": 0.1, "data": [0.00123456789, 0.002, 0.004]}
    path = stored(tmp_path, raw)
    before = records.read(path)
    assert report.main([str(path)]) == 0
    printed, text = capsys.readouterr().out, path.read_text()
    assert len(text.splitlines()) == len(records.MACHINE) + 8
    assert "[0.00123457, 0.002, 0.004]" in text
    assert text.count("chip") == 1
    assert "mean" not in text
    for row, again in zip(before, records.read(path), strict=True):
        assert again.info == {**dict.fromkeys(records.MACHINE), **row.info}
        assert again.times == pytest.approx(row.times, rel=1e-5)
        assert (again.group, again.label, again.order) == (row.group, row.label, row.order)
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out == printed
    assert path.read_text() == text


def test_what_cannot_be_reported_stays_as_it_is(tmp_path):
    path = stored(tmp_path, recorded(device="another"))
    before = path.read_text()
    assert report.main([str(path)]) == 1
    assert path.read_text() == before


BEGIN, END = report.markers("chip")


def test_readme_is_rewritten_between_the_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = [str(stored(tmp_path, recorded())), "--readme", "--readme-path", str(readme)]
    for _ in range(2):  # and again: the same
        assert report.main(arguments) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{BEGIN}\n| forward and gradients | ours | ")
        assert text.endswith(f"{END}\nafter\n")
        assert "old" not in text
    assert (tmp_path / "chip.md").read_text().startswith("### gelu\n")
    picture = tmp_path / "chip_gelu.svg"
    assert str(picture) in capsys.readouterr().out
    assert "time over ours" in picture.read_text() or picture.stat().st_size > 1000


@pytest.mark.parametrize(
    "text",
    ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}" * 2],
    ids=["none", "one", "wrong order", "twice"],
)
def test_missing_markers_change_nothing(tmp_path, capsys, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    arguments = [str(stored(tmp_path, recorded())), "--readme", "--readme-path", str(readme)]
    assert report.main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert readme.read_text() == text


def test_the_suite_writes_what_the_report_reads(tmp_path):
    """One operator, one round, through pytest-benchmark's own JSON."""
    path = tmp_path / "here.json"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/test_gelu.py", "-p", "no:xdist"]
    command += ["-k", "float32 and fwd and not bwd and not compiled", "--rounds", "2"]
    # pytest-benchmark refuses to measure in a worker of xdist, which it knows by these variables
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, f"--benchmark-json={path}"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = records.read(path)
    assert {row.implementation for row in rows} == {"ours", "eager"}
    assert all(len(row.times) == 2 and row.median > 0 for row in rows)
    assert all(row.info["commit"] and row.info["shape"] and row.info["dtype"] for row in rows)
    assert report.markdown(rows).count("| ours |") == 1
