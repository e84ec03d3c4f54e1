"""The numbers and pictures of the documentation are the recorded ones."""

import itertools
import json
import re
import statistics
from xml.etree import ElementTree

import pytest
import torch

import diversevit_fast as dvf
from benchmarks import front_page, records, report
from benchmarks.orders import DOUBLE_BWD
from tests.helpers.pages import PAGES, ROOT
from tools.docs import effect, pipeline, support

BENCHMARKS = PAGES["docs/benchmarks.md"]


def between(text: str, name: str) -> str:
    """What stands between the markers of ``name``, which are there once."""
    begin, end = report.markers(name)
    assert text.count(begin) == text.count(end) == 1
    return text.partition(begin)[2].partition(end)[0]


def recorded(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))


def test_step_table_is_the_recorded_result():
    """The table holds the ratios of benchmarks/results, not others."""
    for name, row in recorded("paper_step")["rows"].items():
        assert f"| {name} | {row['median_ms']:.0f} ms | {row['ratio']:.2f} |" in BENCHMARKS, name


def test_memory_table_is_the_recorded_result():
    peaks = recorded("memory")["peak"] | recorded("checkpointed_step")["peak"]
    for workload, rows in peaks.items():
        base = next(iter(rows.values()))
        for name, n in rows.items():
            label = f"{workload.removeprefix('all-layers ')}: {name}"
            assert f"| {label} | {n / 2**20:.0f} MiB | {n / base:.2f} |" in BENCHMARKS, label


def test_masks_and_checkpoints_cost_what_was_recorded():
    """The sentences of two other pages."""
    peaks, seconds = recorded("memory")["peak"], recorded("memory")["seconds"]
    mask, page = "attention with a trained mask", " ".join(PAGES["docs/second_order.md"].split())
    for who in ("ours", "eager"):
        assert f"{_size(peaks[mask][who])} beyond" in page, who
        assert f"{seconds[mask][who]:.0f} s" in page, who
    page = " ".join(PAGES["docs/design/training_systems.md"].split())
    found = recorded("checkpointed_step")
    for name, n in found["peak"]["checkpointed step"].items():
        told = f"{_size(n)} and {found['seconds']['checkpointed step'][name]:.1f} s"
        assert told in page, (name, told)


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**32 else f"{n / 2**20:.0f} MiB"


def test_selection_is_the_recorded_result():
    found = recorded("selection")
    assert (found["choices"], found["batch"]) == (63, 8)
    text = " ".join(PAGES["docs/heads.md"].split())
    assert f"takes {found['rows']['select_heads']['ratio']} of the time" in text


def test_amortised_table_is_the_recorded_result():
    from benchmarks.scripts.amortised import table

    assert f"\n\n{table(recorded('amortised'))}\n\n" in BENCHMARKS


@pytest.mark.parametrize("device", ["cpu", "h200", "second_order"])
def test_benchmark_summary_is_the_recorded_result(device):
    rows = records.read(ROOT / f"benchmarks/results/{device}.json")
    told = between(BENCHMARKS, device)
    assert told == "\n" + report.summary(rows, f"benchmarks/results/{device}.md")


def test_front_page_is_the_recorded_result():
    assert between(PAGES["README.md"], "front") == "\n" + front_page.table(report.recorded())


def test_front_page_shows_what_is_slower():
    """Eight rows of the same operators on every device; a speed below 1 is there, and marked."""
    rows = report.recorded()
    lines = front_page.table(rows).splitlines()[2:10]
    assert len(lines) == len(front_page.LINES) == 8
    for line, text in zip(front_page.LINES, lines, strict=True):
        for device in front_page.DEVICES:
            shown = [row for row in rows[device] if line.shows(row)]
            if not shown:
                assert (device, line.graph) == ("cpu", True)
                continue
            speed = front_page.speed(line, rows[device])
            assert (f"**{speed:.2f}**" if speed < 0.995 else f"| {speed:.2f} |") in text
    assert any("**" in line for line in lines)


def test_figures_of_the_gpu_page_are_the_recorded_ones():
    """What the prose says of the H200: memory, speed, and the step in a CUDA graph."""
    text = " ".join(PAGES["docs/gpu.md"].split())
    rows = records.read(ROOT / "benchmarks/results/h200.json")
    graph = {
        row.implementation: 1e3 * row.median
        for row in rows
        if row.group.endswith("CUDA graph") and "ViT-S" in row.group
    }
    assert (
        f"takes {graph['ours']:.1f} ms, against {graph['eager']:.0f} in eager's own CUDA graph and "
        f"{graph['erm']:.0f} for ERM" in text
    )
    speeds = {}
    for row in rows:
        if row.implementation == "eager" and row.order == DOUBLE_BWD:
            speeds.setdefault(row.workload, []).append(row.ratio)
    routed, norm = speeds["routed_head_penalty"], speeds["layer_norm"]
    assert f"The routed penalty takes 1/{min(routed):.1f} to 1/{max(routed):.1f}" in text
    assert f"LayerNorm 1/{min(norm):.1f} to 1/{max(norm):.1f}" in text
    plain = speeds["head_penalty"]
    assert f"the head penalty 1/{min(plain):.0f} to 1/{max(plain):.0f}" in text


def test_the_number_of_models_is_the_tested_one():
    models = json.loads(support.RESULTS.read_text("utf-8"))["models"]
    assert f"{len(models)} models of timm" in " ".join(PAGES["README.md"].split())


def test_picture_is_drawn_by_its_script():
    assert pipeline.PICTURE.read_text(encoding="utf-8") == pipeline.draw()


def test_the_effect_is_drawn_from_the_record():
    """Picture, its alternative text and the page of the run say the same; another record gives another picture."""
    record = json.loads(effect.RESULT.read_text("utf-8"))
    drawn = effect.draw(record)
    assert effect.PICTURE.read_text("utf-8") == drawn
    drawn_parts = ElementTree.fromstring(drawn).iter()
    words = [part.text or "" for part in drawn_parts if part.tag.endswith("text")]
    page = " ".join(PAGES["docs/science/default_run.md"].split())
    for title in ("The penalty makes heads read differently", "Pruning to the selected head helps"):
        verdict, value = words[words.index(title) + 1].split(", ")
        assert f"**{title}: {verdict}.**" in page
        assert f"{value} over" in page
    alike = {
        method: statistics.mean(
            one.alike for one in effect.trainings(record) if one.method == method
        )
        for method in effect.COLORS
    }
    told = f"about {alike['erm']:.2f} after ERM and {alike['diversevit']:.2f} after DiverseViT"
    assert told in PAGES["README.md"]
    record["cosines"]["erm-seed0"]["after"] = record["cosines"]["diversevit-seed0"]["after"]
    assert effect.draw(record) != drawn


def test_the_picture_names_files_that_do_it():
    """Each step's file exists and holds what the step is about; the last one is the user's."""
    boxes = [box for boxes in pipeline.LANES.values() for box in boxes]
    *ours, last = boxes
    assert last.file == "your training loop"
    for box in ours:
        assert (ROOT / "diversevit_fast" / box.file).is_file(), box.file
    assert len(ElementTree.fromstring(pipeline.draw())) > 3 * len(boxes)


def test_the_formula_of_the_front_page_is_what_is_computed():
    formula, _ = re.findall(r"```math\n(.*?)```", PAGES["README.md"], re.DOTALL)
    assert r"\frac{1}{B N H^2} \sum_{b,\,n} \; \sum_{h \neq h'} \cos^2" in formula
    B, H, N, D = 2, 3, 4, 5
    u = torch.randn(B, H, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = sum(
        torch.cosine_similarity(u[b, h, n], u[b, k, n], dim=0) ** 2
        for b, n, h, k in itertools.product(range(B), range(N), range(H), range(H))
        if h != k
    )
    torch.testing.assert_close(dvf.head_penalty(u), total / (B * N * H**2))
