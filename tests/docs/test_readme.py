"""The README is true: its code runs, its commands exist, its numbers are recorded ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.docs import pipeline

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block-{i}" for i in range(len(BLOCKS))])
def test_code_blocks_run(code):
    prelude = "import warnings; warnings.simplefilter('ignore')\n"
    run = subprocess.run(
        [sys.executable, "-c", prelude + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


def test_there_are_code_blocks():
    assert len(BLOCKS) >= 2


def test_commands_exist():
    from typer.testing import CliRunner

    from diversevit_fast.experiment.cli import app

    named = set(re.findall(r"diversevit ((?:data )?[a-z-]+)", README)) - {"data"}
    assert {"run", "doctor"} <= named
    for command in named:
        result = CliRunner().invoke(app, [*command.split(), "--help"])
        assert result.exit_code == 0, command


def test_step_table_is_the_recorded_result():
    """The table of the README holds the ratios of benchmarks/results, not others."""
    rows = json.loads((ROOT / "benchmarks/results/paper_step.json").read_text())["rows"]
    for name, row in rows.items():
        assert f"| {name} | {row['median_ms']:.0f} ms | {row['ratio']:.2f} |" in README, name


def test_memory_table_is_the_recorded_result():
    peaks = json.loads((ROOT / "benchmarks/results/memory.json").read_text())["peak"]
    for workload, rows in peaks.items():
        base = next(iter(rows.values()))
        for name, n in rows.items():
            label = f"{workload.removeprefix('all-layers ')}: {name}"
            assert f"| {label} | {n / 2**20:.0f} MiB | {n / base:.2f} |" in README, label


def test_selection_is_the_recorded_result():
    found = json.loads((ROOT / "benchmarks/results/selection.json").read_text("utf-8"))
    assert (found["choices"], found["batch"]) == (63, 8)
    assert f"takes {found['rows']['select_heads']['ratio']} of the time" in README


def test_amortised_table_is_the_recorded_result():
    from benchmarks.scripts.amortised import table

    recorded = json.loads((ROOT / "benchmarks/results/amortised.json").read_text("utf-8"))
    assert f"\n\n{table(recorded)}\n\n" in README


@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_benchmark_summary_is_the_recorded_result(device):
    from benchmarks import report

    rows = report.read(ROOT / f"benchmarks/results/{device}.json")
    begin, end = report.markers(device)
    told = README.partition(begin)[2].partition(end)[0]
    assert told == "\n" + report.summary(rows, f"benchmarks/results/{device}.md")


def test_picture_is_drawn_by_its_script():
    assert (ROOT / "docs/pipeline.svg").read_text(encoding="utf-8") == pipeline.draw()
