"""The page's table of measured steps is the record's, and memory is still predicted as it was measured."""

import json
import re
import statistics

import pytest
import timm
import torch

import diversevit_fast as dvf
from tests.test_tree import ROOT

RESULTS = json.loads((ROOT / "benchmarks/results/cost.json").read_text("utf-8"))
RECORD = RESULTS["rows"]
PAGE = (ROOT / "docs/scaling.md").read_text("utf-8")
NAMES = {
    "ViT-Ti": "vit_tiny_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "ViT-L": "vit_large_patch16_224",
}


def error(row, what):
    return row[f"predicted_{what}"] / row[what] - 1


@pytest.mark.parametrize("row", RECORD, ids=lambda r: f"{r['model']} {r['step']} {r['dtype']}")
def test_the_page_shows_the_record(row):
    name = f"| {row['model']} {row['dtype']} | {row['step']} |"
    line = next(line for line in PAGE.splitlines() if line.startswith(name))
    shown = [float(x) for x in re.findall(r"-?[\d.]+(?= (?:s|%|MiB))", line)]
    seconds = row["predicted_seconds"], row["seconds"], 100 * error(row, "seconds")
    size = (row[f"{key}bytes"] / 2**20 for key in ("predicted_", ""))
    wanted = [*seconds, *size, 100 * error(row, "bytes")]
    assert shown == pytest.approx(wanted, rel=0.01, abs=0.6)


def test_the_errors_that_the_page_names():
    times = [abs(error(row, "seconds")) for row in RECORD]
    sizes = [abs(error(row, "bytes")) for row in RECORD]
    said = re.search(r"in the median (\d+) %, at worst (\d+) %; of memory at worst (\d+) %", PAGE)
    wanted = statistics.median(times), max(times), max(sizes)
    assert [int(x) for x in said.groups()] == [round(100 * x) for x in wanted]


@pytest.mark.parametrize("row", RECORD[:3], ids=lambda row: row["step"])
def test_memory_is_predicted_as_it_was_measured(row):
    with torch.device("meta"):
        model = timm.create_model(NAMES[row["model"]], num_classes=10)
    layers = None if row["step"] == "erm" else row["step"]
    found = dvf.cost(model, layers, batch=row["batch"], dtype=row["dtype"])
    parts = found.peak.parts
    before = ("parameters", "optimizer state", "batch", "workspace")
    assert found.peak_bytes - sum(parts[x] for x in before) == pytest.approx(row["bytes"], rel=0.1)


@pytest.mark.parametrize("row", RESULTS["whole"], ids=lambda row: f"{row['model']} {row['step']}")
def test_a_whole_process_held_what_is_predicted(row):
    name = f"| {row['model']} {row['dtype']}, {row['step']}, batch {row['batch']} |"
    line = next(line for line in PAGE.splitlines() if line.startswith(name))
    shown = [float(x) for x in re.findall(r"-?[\d.]+(?= (?:s|%|GiB))", line)]
    sizes = (row[f"{key}bytes"] / 2**30 for key in ("predicted_", ""))
    times = row["predicted_seconds"], row["seconds"]
    wanted = [*sizes, 100 * error(row, "bytes"), *times, 100 * error(row, "seconds")]
    assert shown == pytest.approx(wanted, rel=0.01, abs=0.6)
    with torch.device("meta"):
        model = timm.create_model(NAMES[row["model"]], num_classes=10)
    found = dvf.cost(model, row["step"], batch=row["batch"], dtype=row["dtype"])
    assert found.peak_bytes == pytest.approx(row["bytes"], rel=0.05)
    assert f"{row['bytes_with_libraries'] / 2**30:.2f} GiB with the libraries" in PAGE
