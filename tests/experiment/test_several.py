"""Runs that are joined, looked at while they go on, and read as tables."""

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.console import Console

from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import load_metrics, metrics, resolve, resume, run, several
from diversevit_fast.experiment.checkpoint import read, write_content
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.run import Interrupted
from diversevit_fast.experiment.run_folder import Lock
from diversevit_fast.experiment.verdict import verdicts
from tests.experiment.test_report import text_of
from tests.helpers.interrupts import interrupted_after_an_epoch

TINY = json.loads(Path(__file__).with_name("tiny_run.json").read_text())


def train(folder: Path, **changes) -> Path:
    return run(resolve({**TINY, **changes}), folder, console=Console(file=io.StringIO()))


def numbers(rows) -> list[dict]:
    """Rows without what differs from run to run, as ``metrics.csv`` rounds them."""
    return [
        {
            k: f"{v:.9g}" if isinstance(v, float) else v
            for k, v in row.items()
            if k not in metrics.TIMING
        }
        for row in rows
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """``whole`` of seeds 0 and 1, and the same in two runs, ``a`` and ``b``."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seeds in (("whole", (0, 1)), ("a", (0,)), ("b", (1,))):
        train(folder / name, seeds=seeds)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run that was interrupted after the first epoch of its second training."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        train(folder, seeds=(3, 4))
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        resume(folder, console=Console(file=io.StringIO()))
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        resume(folder, console=Console(file=io.StringIO()))
    return folder.with_name("run.partial")


class TestJoin:
    def test_seeds_of_two_runs_are_those_of_one(self, runs):
        whole = several.read_run(runs / "whole")
        joined = several.join([several.read_run(runs / name) for name in ("b", "a")])
        assert numbers(joined.rows) == numbers(whole.rows)
        assert joined.cosines == whole.cosines
        assert joined.settings.seeds == (0, 1)
        assert verdicts(joined.rows, joined.cosines) == verdicts(whole.rows, whole.cosines)

    def test_methods_of_two_runs_are_those_of_one(self, runs, tmp_path):
        erm = train(tmp_path / "erm", seeds=(0,), methods=("erm",), lr=0.5, penalty_weight=7.0)
        other = train(tmp_path / "div", seeds=(0,), methods=("diversevit",), erm_lr=0.5)
        joined = several.join([several.read_run(other), several.read_run(erm)])
        assert numbers(joined.rows) == numbers(several.read_run(runs / "a").rows)
        assert joined.settings == several.read_run(runs / "a").settings

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seeds": [0]}, "every training once, got erm-seed0 in a and other"),
            ({"lr": 0.5}, "runs: expected the same lr in all, got 0.0003 in a, 0.5 in other"),
            ({"epochs": 3}, "the same epochs in all"),
            ({"threads": 2, "device": "cuda", "preset": "paper", "graph": False}, None),
        ],
    )
    def test_other_settings_are_named(self, changes, said, runs, tmp_path):
        shutil.copytree(runs / "b", tmp_path / "other")
        path = tmp_path / "other" / "config.json"
        record = json.loads(path.read_text())
        record["settings"] |= changes
        path.write_text(json.dumps(record))
        if changes.get("seeds") == [0]:
            for name in ("metrics.csv", "cosines.json"):
                shutil.copy(runs / "a" / name, tmp_path / "other")
        read = [several.read_run(runs / "a"), several.read_run(tmp_path / "other")]
        if said is None:
            assert several.join(read).settings.seeds == (0, 1)
            return
        with pytest.raises(UsageError) as error:
            several.join(read)
        assert said in str(error.value)

    def test_other_data_are_named(self, runs, tmp_path):
        shutil.copytree(runs / "b", tmp_path / "other")
        path = tmp_path / "other" / "config.json"
        record = json.loads(path.read_text())
        record["splits"]["val_ood"]["sha256"] = "0"
        path.write_text(json.dumps(record))
        with pytest.raises(UsageError) as error:
            several.join([several.read_run(runs / "a"), several.read_run(tmp_path / "other")])
        assert "other images for val_ood in a and other" in str(error.value)

    def test_command_writes_one_page_and_table(self, runs, tmp_path, capsys):
        page = tmp_path / "all.html"
        before = files_of(runs)
        with pytest.raises(SystemExit) as end:
            main(["report", str(runs / "a"), str(runs / "b"), "--out", str(page)])
        assert end.value.code == 0
        assert files_of(runs) == before
        joined = several.join([several.read_run(runs / name) for name in ("a", "b")])
        assert numbers(metrics.read_csv(tmp_path / "all.csv")) == numbers(joined.rows)
        printed = capsys.readouterr().out
        text = text_of(page)
        for line in metrics.compare(joined.rows):
            assert str(line.test_ood) in printed
            assert str(line.test_ood) in text
        assert "2 seeds" in text
        assert "Joined from 2 runs" in text
        assert "all.csv" in text
        assert sorted(p.name for p in tmp_path.iterdir()) == ["all.csv", "all.html"]


class TestUnfinished:
    def test_rows_are_those_of_the_checkpoints(self, begun):
        read_ = several.read_run(begun)
        epochs = [(r["seed"], r["method"], r["epoch"]) for r in read_.rows if r["split"] == "train"]
        assert epochs == [(3, "erm", 1), (3, "erm", 2), (3, "diversevit", 1)]
        assert read_.missing == [
            "DiverseViT seed 3: 1 of 2 epochs",
            "ERM seed 4: not begun",
            "DiverseViT seed 4: not begun",
        ]
        assert list(read_.finished().cosines) == ["erm-seed3"]

    @pytest.mark.parametrize("name", ["run", "run.partial"])
    def test_command_looks_while_another_process_trains(self, name, begun, capsys):
        page = begun.with_name("run-so-far.html")
        before = files_of(begun)
        with Lock() as lock:
            lock.take(begun)
            with pytest.raises(SystemExit) as end:
                main(["report", str(begun.with_name(name))])
        assert end.value.code == 0
        after = files_of(begun)
        after.pop(str(begun / ".lock"))
        before.pop(str(begun / ".lock"), None)
        assert after == before
        printed = capsys.readouterr().out
        assert "not finished: DiverseViT seed 3: 1 of 2 epochs\n" in printed
        text = text_of(page)
        assert "Not finished. DiverseViT seed 3: 1 of 2 epochs; ERM seed 4: not begun" in text
        assert "The penalty makes" not in text  # one finished training says nothing about that
        rows = numbers(metrics.read_csv(page.with_suffix(".csv")))
        assert rows == numbers(several.read_run(begun).rows)

    def test_the_end_is_the_run_s(self, begun, tmp_path):
        shutil.copytree(begun, tmp_path / "run.partial")
        before = several.read_run(tmp_path / "run").rows
        resume(tmp_path / "run", console=Console(file=io.StringIO()))
        for name in ("run", "run.partial"):  # whoever held the old name finds it
            whole = several.read_run(tmp_path / name)
            assert whole.missing == []
            assert all(row in numbers(whole.rows) for row in numbers(before))

    def test_a_foreign_checkpoint_is_refused(self, begun, tmp_path):
        copy = tmp_path / "run.partial"
        shutil.copytree(begun, copy)
        path = copy / "checkpoints" / "erm-seed3.pt"
        content = read(path)
        for change in ({"rows": content["rows"][1:]}, {"epoch": 3}, {"cosines": {}}, {"run": "x"}):
            write_content(path, {**content, **change})
            with pytest.raises(UsageError) as error:
                several.read_run(copy)
            assert "erm-seed3.pt" in str(error.value)

    def test_checkpoints_of_before_a_setting_was_added_are_this_run_s(self, begun, tmp_path):
        copy = tmp_path / "run.partial"
        shutil.copytree(begun, copy)
        path = copy / "checkpoints" / "diversevit-seed3.pt"
        content = read(path)
        old = json.loads(content["run"])
        assert old.pop("img_size") is None
        write_content(path, {**content, "run": json.dumps(old)})
        assert numbers(several.read_run(copy).rows) == numbers(several.read_run(begun).rows)
        resume(copy, console=Console(file=io.StringIO()))
        changed = {**old, "lr": 0.5}
        other = tmp_path / "other.partial"
        shutil.copytree(begun, other)
        write_content(other / "checkpoints" / path.name, {**content, "run": json.dumps(changed)})
        with pytest.raises(UsageError, match="the checkpoint of another run"):
            resume(other, console=Console(file=io.StringIO()))


class TestLoadMetrics:
    def test_one_and_several(self, runs, begun):
        (one,) = {row["run"] for row in load_metrics(runs / "a")}
        assert one == "a"
        rows = load_metrics([runs / "a", str(begun)])
        assert [row["run"] for row in rows] == sorted(row["run"] for row in rows)
        assert {row["run"] for row in rows} == {"a", "run"}
        plain = [{k: v for k, v in row.items() if k != "run"} for row in rows if row["run"] == "a"]
        assert plain == metrics.read_csv(runs / "a" / "metrics.csv")

    def test_pandas_is_used_where_it_is(self, runs, monkeypatch):
        monkeypatch.setitem(
            sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: ("frame", rows))
        )
        kind, rows = load_metrics(runs / "a")
        assert kind == "frame"
        with (runs / "a" / "metrics.csv").open() as file:
            assert list(rows[0])[1:] == next(csv.reader(file))


MISTAKES = {
    "no page": (["{runs}/a", "{runs}/b"], "out: expected the page of several runs"),
    "no html": (["{runs}/a", "--out", "{tmp}/x.txt"], "out: expected a name that ends in .html"),
    "exists": (["{runs}/a", "--out", "{tmp}/old.html"], "out: expected a new file"),
    "table exists": (["{runs}/a", "--out", "{tmp}/table.html"], "table.csv, which exists"),
    "twice": (["{runs}/a", "{runs}/a", "--out", "{tmp}/x.html"], "every training once"),
    "no run": (["{runs}/a", "{tmp}", "--out", "{tmp}/x.html"], "metrics.csv: expected"),
    "nothing": (["{tmp}/none"], "metrics.csv: expected a readable file"),
    "no epoch": (["{tmp}/empty"], "run: expected a run with a finished epoch"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, runs, begun, tmp_path, capsys):
    (tmp_path / "old.html").write_text("mine")
    (tmp_path / "table.csv").write_text("mine")
    shutil.copytree(begun, tmp_path / "empty.partial")
    for path in (tmp_path / "empty.partial" / "checkpoints").iterdir():
        path.unlink()
    before = files_of(tmp_path)
    arguments, said = MISTAKES[name]
    with pytest.raises(SystemExit) as end:
        main(["report", *(a.format(tmp=tmp_path, runs=runs) for a in arguments)])
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert said in printed
    assert printed.count("\n") == 1
    assert files_of(tmp_path) == before
