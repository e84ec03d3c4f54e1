"""The page of the default run shows what was recorded, and a record is what the run said."""

import json

import pytest

from diversevit_fast.data.dominoes import ID_CORRELATION
from diversevit_fast.experiment import metrics
from diversevit_fast.experiment.config import Settings, resolve
from diversevit_fast.experiment.report import TITLES
from diversevit_fast.experiment.verdict import verdicts
from tools.docs import default_run
from tools.docs.support import between
from tools.pilot.cells import read_lines
from tools.pilot.choose import choose_regime

MARKERS = ("verdicts", "facts", "compared", "trainings", "pilot")
NOT_YET = "Not run yet"


def a_run():
    """Rows and cosines of a made-up run: 4 seeds, 3 epochs, 2 heads, accuracies that all differ."""
    rows, cosines = [], {}
    for m, method in enumerate(("erm", "diversevit")):
        for seed in range(4):
            alike = 0.3 - 0.2 * m + 0.01 * seed
            cosines[f"{method}-seed{seed}"] = {"before": [], "after": [[1, alike], [alike, 1]]}
            for epoch in (1, 2, 3):
                for s, split in enumerate(metrics.EVALUATED):
                    for h, heads in enumerate(("all", "0", "1")):
                        number = (7 * epoch + 5 * h + 11 * seed + 3 * s + 13 * m) % 31 / 100
                        row = {"method": method, "seed": seed, "epoch": epoch, "split": split}
                        accuracy = 0.5 + number + 0.05 * (h > 0)
                        row |= {"heads": heads, "accuracy": accuracy, "worst_group": number}
                        rows.append({**row, "loss": 1.0, "seconds": 1.0})
                row = {"method": method, "seed": seed, "epoch": epoch, "split": "train"}
                rows.append({**row, "heads": "all", "accuracy": 0.9, "worst_group": 0.1})
                rows[-1] |= {"loss": 1.0, "seconds": 1.0, "steps_per_second": 1.0}
    return rows, cosines


@pytest.fixture
def folder(tmp_path):
    rows, cosines = a_run()
    metrics.write_csv(rows, tmp_path / "metrics.csv")
    (tmp_path / "cosines.json").write_text(json.dumps(cosines))
    split = {"samples": 320, "independent": {"digits": 12, "photographs": 34}, "sha256": "0"}
    split["groups"] = {"a + 0": 81, "a + 1": 79, "b + 0": 89, "b + 1": 71}
    record = {
        "settings": Settings(seeds=(0, 1, 2, 3), epochs=3).to_json(),
        "splits": {"test_ood": split},
        "versions": {"torch": "2.99"},
        "machine": {"processor": "a slow one"},
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    return tmp_path


def test_what_is_kept_says_what_the_run_said(folder):
    rows, cosines = a_run()
    result = json.loads(json.dumps(default_run.result_of(folder, "abc", 99.6)))
    kept = default_run.rows_of(result)
    assert len(kept) < len(rows) / 2
    whole = metrics.read_csv(folder / "metrics.csv")
    assert metrics.compare(kept) == metrics.compare(whole)
    assert verdicts(kept, result["cosines"]) == verdicts(whole, cosines)
    page = default_run.tables([], result)
    assert f"{TITLES['differ']}: shows." in page["verdicts"]
    assert max(map(len, page["verdicts"].splitlines())) <= 120
    assert "34 tiles and 12 digits; the digit agrees with the label in 47.5%" in page["facts"]
    assert "* 100 s of processor time" in page["facts"]
    for line in metrics.compare(whole):
        assert f"| {line.test_id} | {line.test_ood} | {line.worst_group} |" in page["compared"]
    picked = metrics.SELECTED.pick(metrics.of_run(whole, "diversevit", 3))
    test = metrics.find(
        metrics.of_run(whole, "diversevit", 3), picked["epoch"], "test_ood", picked["heads"]
    )
    start = f"| DiverseViT | 3 | {picked['epoch']}, {picked['heads']} | {test['accuracy']:.3f} |"
    assert start in page["trainings"]
    assert page["trainings"].splitlines()[-1].endswith("| 0.130 |")


def test_the_program_writes_record_and_page(folder, monkeypatch):
    for name in ("PAGE", "PILOT", "RESULT"):
        monkeypatch.setattr(default_run, name, folder / name)
    (folder / "PAGE").write_text(
        "\n".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in MARKERS)
    )
    default_run.main([str(folder), "--commit", "abc", "--cpu-seconds", "5"])
    page = (folder / "PAGE").read_text()
    assert "old" not in page
    assert "commit abc" in page
    default_run.main([])
    assert (folder / "PAGE").read_text() == page
    with pytest.raises(SystemExit):
        default_run.main([str(folder)])


def test_the_preset_is_what_the_pilot_chose():
    correlation, lr, _ = choose_regime(read_lines(default_run.PILOT))
    settings = resolve({})
    assert settings.preset == "quick"
    assert settings.correlation in (None, correlation)
    assert correlation == ID_CORRELATION
    assert settings.base_lr("erm") == settings.base_lr("diversevit") == lr
    assert len(settings.seeds) >= 5


def test_the_page_shows_what_was_recorded():
    page = default_run.PAGE.read_text("utf-8")
    for name in MARKERS:
        assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1
    assert (NOT_YET in page) == (not default_run.RESULT.exists())
    if default_run.RESULT.exists():
        result = json.loads(default_run.RESULT.read_text("utf-8"))
        for name, lines in default_run.tables(read_lines(default_run.PILOT), result).items():
            assert between(page, name, lines) == page
