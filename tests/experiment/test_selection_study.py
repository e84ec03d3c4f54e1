"""``selection-study``: what rules choose, what that reaches, and how models are compared."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

import diversevit_fast as dvf
from diversevit_fast.data import batches, load_splits
from diversevit_fast.experiment import selection_study as s
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.evaluate import evaluate
from diversevit_fast.experiment.selection_report import across, markdown, table
from diversevit_fast.experiment.selection_rules import BASELINE, rules
from diversevit_fast.models import DiverseViT

SIZES = {"patch_size": 16, "depth": 1, "dim": 16, "num_heads": 3, "head_dim": 8, "mlp_dim": 16}
DATA: Any = {"samples": 200, "correlation": 0.7}
ALWAYS = ["oracle: OOD test itself", "no pruning", "a choice at random"]


def call(*arguments, capsys, code=0):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    assert ended.value.code == code, said.err
    return said.err if code else said.out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of both methods."""
    folder = tmp_path_factory.mktemp("study")
    settings = {"epochs": 1, "batch_size": 50, "threads": 1, "workers": 1, **DATA, "model": SIZES}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as ended:
        main(
            f"run --config {folder}/config.json --seed 7 --lr 0.01 --erm-lr 0.01 --out {folder}/run".split()
        )
    assert ended.value.code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def studied(run, tmp_path_factory):
    lines: list[str] = []
    out = tmp_path_factory.mktemp("out") / "study"
    s.study([str(run)], str(out), s.Conditions(), lines.append)
    return out, lines


@pytest.fixture(scope="module")
def rows(studied):
    text = (studied[0] / "selection.csv").read_text()
    return list(csv.DictReader(io.StringIO(text)))


def test_every_rule_has_a_row_for_every_model_and_pool(rows):
    names = ALWAYS + [rule.name for rule in rules()]
    for method in ("erm", "diversevit"):
        for pool in s.POOLS:
            mine = [r for r in rows if (r["method"], r["pool"]) == (method, pool)]
            assert [r["rule"] for r in mine] == names
            assert {r["seed"] for r in mine} == {"7"}


def test_numbers_are_those_of_the_model_with_these_heads(run, rows):
    splits = load_splits("digits-photos", **DATA)
    model = DiverseViT.load(run / "diversevit-seed7.safetensors").eval()
    mine = [r for r in rows if r["method"] == "diversevit" and r["heads"]]
    for row in [r for r in mine if r["rule"] in (*ALWAYS, BASELINE)]:
        with dvf.keep_heads(model, {-1: [int(h) for h in row["heads"].split()]}):
            ood, ident = (evaluate(model, splits[n], n)[0] for n in ("test_ood", "test_id"))
        assert float(row["test_ood"]) == pytest.approx(ood["accuracy"], abs=1e-6)
        assert float(row["worst_group"]) == pytest.approx(ood["worst_group"], abs=1e-6)
        assert float(row["test_id"]) == pytest.approx(ident["accuracy"], abs=1e-6)


def test_the_baseline_chooses_as_select_heads(run, rows):
    splits = load_splits("digits-photos", **DATA)
    loader = list(batches(splits["val_ood"], 64))
    for method in ("erm", "diversevit"):
        model = DiverseViT.load(run / f"{method}-seed7.safetensors")
        for pool, search in (("single", "single"), ("subsets", "exhaustive")):
            best: Any = dvf.select_heads(model, loader, search=search)[0].kept
            row = next(
                r for r in rows if (r["method"], r["pool"], r["rule"]) == (method, pool, BASELINE)
            )
            assert [int(h) for h in row["heads"].split()] == best[0]


def test_nothing_beats_the_oracle(rows):
    for pool in s.POOLS:
        found = [r for r in rows if r["pool"] == pool and r["regret"]]
        assert {float(r["regret"]) for r in found if r["rule"] == ALWAYS[0]} == {0}
        chosen = [r for r in found if r["rule"] != "no pruning" or pool == "subsets"]
        assert all(float(r["regret"]) >= 0 for r in chosen)
        for r in found:
            best = next(o for o in found if (o["method"], o["rule"]) == (r["method"], ALWAYS[0]))
            more = float(best["test_ood"]) - float(r["test_ood"])
            assert float(r["regret"]) == pytest.approx(more, abs=2e-6)


def test_a_second_time_tables_are_read(studied, run, capsys):
    out, lines = studied
    assert [line.endswith("table of 7 choices of heads") for line in lines] == [True, True]
    before = {p.name: p.read_bytes() for p in out.glob("selection.*")}
    stamps = [p.stat().st_mtime_ns for p in sorted((out / "tables").iterdir())]
    printed = call("selection-study", run, "--out", out, capsys=capsys)
    assert printed.count("table found") == 2
    assert {p.name: p.read_bytes() for p in out.glob("selection.*")} == before
    assert [p.stat().st_mtime_ns for p in sorted((out / "tables").iterdir())] == stamps
    assert before["selection.md"].decode() in printed


def test_other_conditions_are_said_and_change_numbers(studied, run, tmp_path, capsys):
    out, _ = studied
    plain = json.loads((out / "selection.json").read_text())
    options = ("--epoch", "best", "--label-noise", 0.3, "--no-shift")
    other = tmp_path / "other"
    printed = call("selection-study", run, "--out", other, *options, capsys=capsys)
    assert "wrong labels among them: 30 %; OOD data: in-distribution, no shift." in printed
    record = json.loads((other / "selection.json").read_text())
    assert record["conditions"]["label_noise"] == 0.3
    assert record["pools"] != plain["pools"]
    for entries in record["pools"].values():  # tested on in-distribution data alone
        assert all(e["test_ood"] == e["test_id"] for e in entries if e["models"])


def test_train_data_and_last_weights(run, tmp_path, capsys):
    options = ("--epoch", "last", "--id-split", "train")
    printed = call("selection-study", run, "--out", tmp_path / "x", *options, capsys=capsys)
    assert "weights of the last epoch; ID data: train" in printed


def test_markdown_is_made_from_the_record(studied):
    record = json.loads((studied[0] / "selection.json").read_text())
    assert (studied[0] / "selection.md").read_text() == markdown(record)
    for entries in record["pools"].values():
        assert len(table(entries).splitlines()) == 2 + len(ALWAYS) + len(rules())


def test_several_studies_side_by_side():
    entry = {"rule": "a", "models": 2, "refused": 1, "regret": [0.1, 0.05, 0.2]}
    none = {"rule": "b", "models": 0, "refused": 3}
    records: Any = {
        "first": {"pools": {"single": [entry]}},
        "second": {"pools": {"single": [{**entry, "refused": 0}, none]}},
    }
    assert across(records, "single").splitlines()[2:] == [
        "| a | 0.100 (1 refused) | 0.100 |",
        "| b | — | refused |",
    ]


class TestConditions:
    @pytest.fixture
    def kept(self, studied):
        path = next((studied[0] / "tables").glob("erm*"))
        return dvf.HeadTable.load(path)

    def test_wrong_labels_are_as_many_as_asked(self, kept):
        noisy: Any = s._conditioned(kept, s.Conditions(label_noise=0.25)).split("id").labels
        clean: Any = kept.split("val_id").labels
        assert 0.15 < (noisy != clean).double().mean() < 0.35
        same: Any = s._conditioned(kept, s.Conditions()).split("id").labels
        assert torch.equal(same, clean)
        every: Any = s._conditioned(kept, s.Conditions(label_noise=1.0)).split("id").labels
        assert (every != clean).all()

    def test_without_shift_the_two_halves_are_all_images(self, kept):
        table = s._conditioned(kept, s.Conditions(shift=False))
        ood, test = table.split("ood"), table.split("test_ood")
        assert len(ood) == len(test) == 100
        both = torch.cat([ood.confidence[0], test.confidence[0]]).sort().values
        assert torch.equal(both, kept.split("test_id").confidence[0].sort().values)
        assert table.split("test_id") is test

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"epoch": "first"}, "epoch: expected one of best, last"),
            ({"id_split": "val_ood"}, "id_split: expected one of val_id, train"),
            ({"label_noise": 1.5}, "label_noise: expected a fraction"),
            ({"label_noise": float("nan")}, "label_noise: expected a fraction"),
        ],
    )
    def test_what_is_refused(self, change, message):
        with pytest.raises(dvf.UsageError, match=f"^{message}"):
            s.Conditions(**change)


class TestSummary:
    def rows(self, regrets):
        return [
            {
                **{"run": "r", "method": "erm", "seed": i, "rule": rule, "test_id": 0.9},
                **{"test_ood": None if x is None else 0.8 - x, "worst_group": 0.5, "regret": x},
            }
            for rule, values in regrets.items()
            for i, x in enumerate(values)
        ]

    def test_pairs_models_with_the_baseline(self):
        regrets = {BASELINE: [0.1, 0.0, 0.2, 0.0], "other": [0.0, 0.0, None, 0.3]}
        base, other = s._summarise(self.rows(regrets))
        assert base["win_tie_loss"] == [0, 4, 0]
        assert base["more_regret"] == [0, 0, 0]
        assert base["no_worse"]
        assert other["models"] == 3
        assert other["refused"] == 1
        assert other["win_tie_loss"] == [1, 1, 1]
        assert other["more_regret"][0] == pytest.approx((-0.1 + 0 + 0.3) / 3, abs=1e-6)
        assert other["regret"][0] == pytest.approx(0.1, abs=1e-6)
        assert not other["no_worse"]

    def test_a_rule_that_is_always_refused_has_no_numbers(self):
        entry = s._summarise(self.rows({BASELINE: [0.1], "other": [None]}))[1]
        assert (entry["models"], entry["refused"]) == (0, 1)
        assert "regret" not in entry
        assert table([entry]).splitlines()[-1].endswith("| — | — | — | — | — | — |")

    def test_the_interval_is_that_of_a_mean(self):
        values = torch.randn(200, generator=torch.Generator().manual_seed(1)).tolist()
        mean, low, high = s._interval(values)
        error = torch.tensor(values).std() / 200**0.5
        assert mean == pytest.approx(sum(values) / 200, abs=1e-6)
        assert high - mean == pytest.approx(1.96 * float(error), rel=0.15)
        assert mean - low == pytest.approx(1.96 * float(error), rel=0.15)
        assert s._interval([0.5, 0.5]) == [0.5, 0.5, 0.5]


def test_runs_that_are_refused(run, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*arguments):
        said = call("selection-study", *arguments, "--out", out, capsys=capsys, code=2)
        assert said.count("\n") == 1
        return said

    assert "run: expected a folder that exists" in refused(tmp_path / "none")
    assert "one of them twice" in refused(run, f"{run}/")
    copy = tmp_path / "copy"
    copy.mkdir()
    assert "config.json" in refused(copy)
    record = json.loads((run / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(record))
    assert "a finished one with erm-seed7.safetensors" in refused(copy)
    assert not out.exists()
    for weights in run.glob("*.safetensors"):
        (copy / weights.name).write_bytes(weights.read_bytes())
    record["splits"]["val_ood"]["sha256"] = "0" * 64
    (copy / "config.json").write_text(json.dumps(record))
    assert "another split val_ood" in refused(copy)
    assert not list(Path(out / "tables").iterdir())


def test_a_damaged_table_is_named(studied, run, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "tables").mkdir(parents=True)
    for path in (studied[0] / "tables").iterdir():
        (out / "tables" / path.name).write_bytes(path.read_bytes()[:-200])
    said = call("selection-study", run, "--out", out, capsys=capsys, code=2)
    assert "a file that HeadTable.save wrote" in said
    assert ".npz" in said
