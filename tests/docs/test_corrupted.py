"""The page of corrupted images is made of its results, which are means of what ``evaluate --corrupt`` wrote."""

import json

import pytest

from diversevit_fast.data.corruptions import CORRUPTIONS, SEVERITIES
from tools.docs import corrupted
from tools.docs.support import between


def rows():
    """Accuracies that tell their place: of a choice its number, plus a hundredth of the severity."""
    cells = [("none", 0), *((name, level) for name in CORRUPTIONS for level in SEVERITIES)]
    return [
        {"split": split, "corruption": name, "severity": level, "choice": choice}
        | {"accuracy": i + level / 100 + (name == "fog") + (split == "test_ood") / 10}
        for name, level in cells
        for split in corrupted.SPLITS
        for i, choice in enumerate(corrupted.CHOICES)
    ]


def test_means(tmp_path):
    for file in ("erm-seed0.json", "erm-seed1.json"):
        (tmp_path / file).write_text(json.dumps(rows()))
    result = corrupted.result_of(tmp_path, "abc", 1.4)
    assert [(x["method"], x["seed"]) for x in result["trainings"]] == [("erm", 0), ("erm", 1)]
    found = result["trainings"][1]["test_ood"]["oracle"]
    assert found["severities"] == pytest.approx(
        [2.1, *(2.1 + level / 100 + 1 / len(CORRUPTIONS) for level in SEVERITIES)], abs=1e-4
    )
    assert found["corruptions"]["fog"] == pytest.approx(3.13)
    assert found["corruptions"]["snow"] == pytest.approx(2.13)
    shown = corrupted.tables(result)["severities"]
    assert "| OOD | ERM | oracle | 2.100 |" in shown


def test_the_page_shows_what_was_recorded():
    page = corrupted.PAGE.read_text("utf-8")
    for name, lines in corrupted.tables(json.loads(corrupted.RESULT.read_text("utf-8"))).items():
        assert page.count(f"<!-- {name}:begin -->") == 1
        assert between(page, name, lines) == page
