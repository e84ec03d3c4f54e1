"""Host time and counts on the GPU that computes nothing: launches and waits exactly, times as ratios with slack."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks import host_time
from benchmarks.fake_gpu.build import UNAVAILABLE

ROOT = Path(__file__).parents[2]

LAUNCHES = {  # operator -> Triton launches of forward without and with a graph, with backward, and to second order
    "gelu": (0, 0, 0, 1),
    "layer_norm": (0, 0, 0, 2),
    "attention": (1, 1, 3, 5),
    "attention_qkvpacked": (1, 1, 3, 5),
    "head_penalty": (2, 2, 3, 5),
    "routed_head_penalty": (5, 5, 18, 50),
}
MOST = {  # operator -> most times PyTorch's own host time: with backward, and to second order
    "gelu": (1.75, 1.5),
    "layer_norm": (1.75, 1.0),
    "attention": (1.75, 0.6),
    "attention_qkvpacked": (1.1, 0.4),
    "head_penalty": (0.5, 0.4),
    "routed_head_penalty": (0.5, 0.4),
}
STEPS = {  # step, by whom -> Triton launches, and most times stock ERM's host time
    ("paper", "ours, last layer"): (20, 2.5),
    ("paper", "ours, all layers"): (120, 5.0),
    ("ViT-S", "ours, last layer"): (20, 2.2),
    ("ViT-S", "ours, all layers"): (240, 4.5),
}


def measure(only=""):
    command = [sys.executable, "-m", "benchmarks.host_time", "--json", "--rounds", "10"]
    command += ["--only", only]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if ran.returncode == UNAVAILABLE:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


measured = cache(measure)


def least_ratios(first, again, most):
    """Return each ratio's least value of up to five measurements: a busy machine may slow every round of one."""
    ratios = dict(first)
    for _ in range(4):
        if all(ratios[name] <= most[name] for name in most):
            break
        ratios = {name: min(ratios[name], ratio) for name, ratio in again().items()}
    return ratios


@pytest.mark.parametrize("operator", LAUNCHES)
def test_operators(operator):
    def rows_of(found):
        return [row for row in found["operators"] if row["operator"] == operator]

    def ratios_of(found):
        return dict(
            zip(
                ("1st order", "2nd order"),
                (row["ratio"] for row in rows_of(found)[-2:]),
                strict=True,
            )
        )

    rows = rows_of(measured())
    assert tuple(row.get("triton", 0) for row in rows) == LAUNCHES[operator]
    assert not any(row.get("waits", 0) or row.get("copies", 0) for row in rows)
    most = dict(zip(("1st order", "2nd order"), MOST[operator], strict=True))
    ratios = least_ratios(
        ratios_of(measured()), lambda: ratios_of(measure(f"{operator} fwd+bwd")), most
    )
    assert all(ratios[name] <= most[name] for name in most), f"{ratios}, at most {most}"


@pytest.mark.parametrize(("step", "who"), STEPS)
def test_steps(step, who):
    def rows_of(found):
        return {row["who"]: row for row in found["steps"] if row["step"] == step}

    def ratios_of(found):
        rows = rows_of(found)
        loop = rows.get("published loop", {"us": float("inf")})
        return {"ERM": rows[who]["ratio"], "published loop": rows[who]["us"] / loop["us"]}

    launches, over_erm = STEPS[step, who]
    row = rows_of(measured())[who]
    assert row["triton"] == launches
    assert row.get("waits", 0) == 0
    most = {"ERM": over_erm, "published loop": 0.9 if "last" in who else 1.2}
    ratios = least_ratios(ratios_of(measured()), lambda: ratios_of(measure(step)), most)
    assert all(ratios[name] <= most[name] for name in most), f"{ratios}, at most {most}"


def test_least_times_of_jobs_that_take_turns():
    calls = []
    least = host_time.minima({"a": lambda: calls.append("a"), "b": lambda: sum(range(9999))}, 3)
    assert 0 < least["a"] < least["b"]


def test_the_record_holds_a_row_a_line():
    found = {"machine": {"cpu": "x"}, "steps": [{"us": 1}, {"us": 2}]}
    text = host_time.compact(found)
    assert json.loads(text) == found
    assert len(text.splitlines()) == 5
