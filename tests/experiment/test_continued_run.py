"""A run trained further in a folder of its own: to the end of one in one piece, and never at the old run's expense."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import (
    Settings,
    continue_run,
    continued_run,
    load_metrics,
    resolve,
    resume,
    run,
    sharded,
    write_report,
)
from diversevit_fast.experiment import train as training
from diversevit_fast.experiment.checkpoint import State
from diversevit_fast.experiment.cli import main
from diversevit_fast.experiment.distributed import OneProcess
from diversevit_fast.experiment.run import Interrupted
from diversevit_fast.experiment.run_folder import Lock, write_record
from diversevit_fast.experiment.several import join, read_run
from tests.experiment import test_run_folder
from tests.experiment.test_experiment import contents, quiet, rich_console
from tests.experiment.test_report import text_of
from tests.experiment.test_run_folder import TASK, as_ranks_left_it, flip, start, stop
from tests.helpers.interrupts import interrupted_after_an_epoch

pytest.importorskip("typer")
quick = test_run_folder.quick


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files of a folder, with the times at which they were written."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def onward(folder: Path, out: Path, **changes) -> Path:
    """Continue a run, which must not change."""
    before = state_of(folder)
    try:
        return continue_run(folder, out, console=quiet(), **changes)
    finally:
        assert state_of(folder) == before


def refused(folder: Path, out: Path, **changes) -> str:
    """The one line that says why a run is not continued; nothing is left of the new one."""
    with pytest.raises(UsageError) as failure:
        onward(folder, out, **changes)
    assert "\n" not in str(failure.value)
    assert not list(out.parent.glob(f"*{out.name}*"))
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    return str(failure.value)


def origin_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["continued_from"]


@pytest.fixture(scope="module")
def short(quick, tmp_path_factory) -> Path:
    """A finished run of two epochs."""
    return start(tmp_path_factory.mktemp("short") / "short")


@pytest.fixture(scope="module")
def further(short, tmp_path_factory) -> Path:
    """The same, continued to five."""
    return onward(short, tmp_path_factory.mktemp("further") / "further", epochs=5)


@pytest.fixture(scope="module")
def original(quick, tmp_path_factory) -> Path:
    """Two trainings, the first of which ended after its first of five epochs; the second was not begun."""
    return stop(tmp_path_factory.mktemp("stopped") / "out", epochs=5, seeds=(0, 1))


@pytest.fixture
def stopped(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "old.partial")


class TestMoreEpochs:
    def test_the_end_is_that_of_a_run_in_one_piece(self, further, tmp_path):
        whole = start(tmp_path / "whole", epochs=5, schedule_epochs=2)
        assert contents(further) == contents(whole)
        assert contents(further) != contents(start(tmp_path / "other", epochs=5))
        again = resolve({"workers": 1}, further / "config.json")  # as the page says
        assert contents(run(again, tmp_path / "again", console=quiet())) == contents(whole)

    def test_the_record_says_where_it_comes_from(self, short, further):
        old, new = (json.loads((f / "config.json").read_text()) for f in (short, further))
        assert origin_of(further) == {
            "run": str(short),
            "commit": old["commit"],
            "sha256": old["sha256"],
            "epochs": {"erm-seed0": 2},
            "changed": {"epochs": [2, 5]},
            "platform": {},
            "learning_rate_factors": [[1, 1.0], [2, 0.1], [3, 0.01]],
        }
        assert (new["settings"]["epochs"], new["settings"]["schedule_epochs"]) == (5, 2)
        assert "continued_from" not in old

    def test_the_page_says_so_too(self, short, further):
        write_report(further)  # as ``diversevit report`` does
        said = text_of(further / "report.html")
        commit = origin_of(further)["commit"] or "unknown"
        assert f"continues {short}, after epoch 2, commit {commit}; epochs 2 → 5" in said
        assert "times 0.1 from epoch 2, times 0.01 from epoch 3 (schedule of 2 epochs)" in said
        assert "trains it in one piece" in said
        assert "continues" not in text_of(short / "report.html")
        assert "tenfold lower after 70 % and 80 % of the epochs" in text_of(short / "report.html")

    def test_commands_read_it(self, further, capsys):
        file = further / "erm-seed0.safetensors"
        for words in (["evaluate", file], ["select-heads", file], ["report", further]):
            with pytest.raises(SystemExit) as end:
                main(list(map(str, words)))
            assert end.value.code == 0, capsys.readouterr().err
        rows = load_metrics([further])
        rows = rows if isinstance(rows, list) else rows.to_dict("records")
        assert {row["epoch"] for row in rows} == {1, 2, 3, 4, 5}

    def test_again_and_again(self, short, further, tmp_path):
        third = onward(further, tmp_path / "third", epochs=6)
        assert origin_of(third)["run"] == str(further)
        assert origin_of(third)["continued_from"] == origin_of(further)
        said = text_of(third / "report.html")
        assert f"continues {further}, after epoch 5" in said
        assert f"which continued {short}, after epoch 2" in said
        whole = start(tmp_path / "whole", epochs=6, schedule_epochs=2)
        assert contents(third) == contents(whole)

    def test_an_interrupted_one_is_resumed_to_the_same_end(self, short, further, tmp_path):
        with interrupted_after_an_epoch(), pytest.raises(Interrupted) as interrupt:
            onward(short, tmp_path / "out", epochs=5)
        assert str(interrupt.value).endswith(f"--resume {tmp_path}/out.partial")
        assert contents(resume(tmp_path / "out", console=quiet())) == contents(further)


class TestSchedules:
    def rates(self, monkeypatch) -> list[float]:
        """The learning rates that epochs are trained with."""
        found: list[float] = []
        train_epoch = training._train_epoch

        def spy(settings, task, state, *rest):
            found.append(state.optimizer.param_groups[0]["lr"] / settings.base_lr(task.method))
            return train_epoch(settings, task, state, *rest)

        monkeypatch.setattr(training, "_train_epoch", spy)
        return found

    def test_an_ended_schedule_stays_at_its_last_rate(self, short, tmp_path, monkeypatch):
        found = self.rates(monkeypatch)
        onward(short, tmp_path / "out", epochs=5)
        assert found == pytest.approx([0.01, 0.01, 0.01])

    def test_a_new_schedule_is_asked_for_and_said(self, short, tmp_path, monkeypatch):
        found = self.rates(monkeypatch)
        heard = io.StringIO()
        console = rich_console.Console(file=heard, width=500)
        out = continue_run(short, tmp_path / "out", epochs=5, schedule_epochs=5, console=console)
        assert found == pytest.approx([1, 1, 0.01])  # epochs 3, 4 and 5 of five
        said = "times 0.1 from epoch 2, times 1 from epoch 3, times 0.01 from epoch 5"
        assert f"learning rate: {said}" in heard.getvalue()
        page = text_of(out / "report.html")
        assert f"{said} (schedule of 5 epochs)" in page
        assert "No single run has this schedule" in page
        assert json.loads((out / "config.json").read_text())["settings"]["schedule_epochs"] is None
        assert origin_of(out)["changed"] == {"epochs": [2, 5], "schedule_epochs": [2, 5]}

    def test_before_the_first_fall_a_new_schedule_is_that_of_one_run(self, tmp_path):
        old = stop(tmp_path / "old", epochs=5)
        new = onward(old, tmp_path / "new", epochs=6, schedule_epochs=6)
        assert contents(new) == contents(start(tmp_path / "whole", epochs=6))
        assert "trains it in one piece" in text_of(new / "report.html")

    def test_all_trainings_have_one_schedule(self, tmp_path):
        """One of two ended, the other did not begin: the first had rates that a new schedule does not have."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "evaluate_splits", self.once(training.evaluate_splits))
            with pytest.raises(KeyboardInterrupt):
                start(tmp_path / "old", seeds=(0, 1))
        old = tmp_path / "old.partial"
        said = refused(old, tmp_path / "new", epochs=5, schedule_epochs=5)
        assert said.startswith("schedule_epochs: expected a schedule by which all trainings have")
        new = onward(old, tmp_path / "new", epochs=5)
        whole = start(tmp_path / "whole", epochs=5, schedule_epochs=2, seeds=(0, 1))
        assert contents(new) == contents(whole)
        assert "1 of 2 trainings after epoch 2, 1 of 2 trainings not begun" in text_of(
            new / "report.html"
        )

    @staticmethod
    def once(evaluate):
        """``evaluate_splits`` for the two epochs of one training; then Ctrl-C."""
        calls = []

        def evaluate_once(*arguments):
            calls.append(0)
            if len(calls) > 2:
                raise KeyboardInterrupt
            return evaluate(*arguments)

        return evaluate_once

    def test_runs_with_other_rates_are_not_joined(self, short, further, tmp_path):
        new = onward(short, tmp_path / "new", epochs=5, schedule_epochs=5)
        plain = start(tmp_path / "plain", epochs=5, seeds=(1,))
        with pytest.raises(UsageError, match="runs: expected the same schedule of the learning"):
            join([read_run(new), read_run(plain)])
        same = start(tmp_path / "same", epochs=5, schedule_epochs=2, seeds=(1,))
        assert join([read_run(further), read_run(same)]).settings.seeds == (0, 1)


class TestOtherMachines:
    def test_other_threads_and_an_unfinished_run(self, stopped, tmp_path):
        new = onward(stopped, tmp_path / "new", threads=2)
        record = json.loads((new / "config.json").read_text())
        assert (record["threads"], record["settings"]["threads"]) == (2, 2)
        assert record["continued_from"]["changed"] == {"threads": [1, 2]}
        assert record["continued_from"]["epochs"] == {"erm-seed0": 1, "erm-seed1": 0}
        assert "threads 1 → 2" in text_of(new / "report.html")
        whole = start(tmp_path / "whole", epochs=5, seeds=(0, 1), threads=2)
        first = {
            key: value for key, value in contents(new).items() if key.startswith("erm-seed1-last")
        }
        assert first  # this one was trained here from the start
        assert first.items() <= contents(whole).items()
        assert resume(stopped, console=quiet()) == tmp_path / "old"  # the old one as before

    def test_another_device(self, stopped, tmp_path):
        new = onward(stopped, tmp_path / "new", device="cpu")
        assert origin_of(new)["changed"]["device"] == ["auto", "cpu"]

    def test_a_device_that_is_not_here(self, stopped, tmp_path, capsys):
        record = json.loads((stopped / "config.json").read_text())
        record["settings"]["device"] = "cuda:99"
        write_record(stopped / "config.json", record)
        with pytest.raises(UsageError) as failure:
            resume(stopped, console=quiet())
        assert str(failure.value) == (
            "device: expected cuda:99, on which the run began, got a machine without it; go on in a new folder: "
            f"diversevit run --continue {stopped} --device cpu"
        )

    def test_what_ran_there_is_said(self, short, tmp_path):
        old = shutil.copytree(short, tmp_path / "old")
        record = json.loads((old / "config.json").read_text())
        record["versions"]["torch"], record["machine"]["processor"] = "1.0", "abacus"
        write_record(old / "config.json", record)
        new = onward(old, tmp_path / "new", epochs=3)
        assert origin_of(new)["platform"] == {"torch": "1.0", "processor": "abacus"}
        assert "there torch 1.0; there processor abacus" in text_of(new / "report.html")

    def test_checkpoints_of_ranks(self, tmp_path):
        old = stop(tmp_path / "old", epochs=4)
        as_ranks_left_it(old)
        new = onward(old, tmp_path / "new", epochs=5)
        assert contents(new) == contents(start(tmp_path / "whole", epochs=5, schedule_epochs=4))

    def test_checkpoints_for_ranks(self, short, tmp_path):
        """What ranks go on from is the same state, in the files that ranks read."""
        settings = Settings.from_json(json.loads((short / "config.json").read_text())["settings"])
        data = test_run_folder.load_splits("digits-photos", samples=8)["train"]
        old = continued_run._Old(short, {}, settings, {TASK: 2})
        longer = replace(settings, epochs=3, schedule_epochs=2)
        continued_run._copy(old, longer, TASK, data, tmp_path, for_ranks=True)
        ranks = OneProcess(torch.device("cpu"))
        states = [State.fresh(longer, TASK, data, ranks.device) for _ in range(2)]
        sharded.restore(states[0], longer, TASK, tmp_path / str(TASK), ranks, print)
        states[1].restore(settings, TASK, short / f"checkpoints/{TASK}.pt")
        one, other = ([*s.model.parameters(), *moments_of(s.optimizer)] for s in states)
        assert all(map(torch.equal, one, other))
        assert len(one) > len(list(states[0].model.parameters()))
        assert (states[0].epoch, states[0].rows) == (2, states[1].rows)


def moments_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [x for state in optimizer.state.values() for _, x in sorted(state.items())]


class TestRefused:
    def test_optimizer_state_that_is_gone(self, tmp_path):
        old = start(tmp_path / "old", keep_checkpoints=False)
        assert refused(old, tmp_path / "new", epochs=5) == (
            f"continue: expected a run with the optimizer's state, got {old}, which kept none for erm-seed0; start a "
            f"new run from its weights: --weights {old}/erm-seed0-last.safetensors"
        )

    def test_a_damaged_checkpoint(self, short, tmp_path):
        old = shutil.copytree(short, tmp_path / "old")
        path = old / f"checkpoints/{TASK}.pt"
        flip(path, 3000)
        said = refused(old, tmp_path / "new", epochs=5)
        assert said.startswith(f"continue: expected an intact checkpoint in {path}, got a damaged")
        assert "delete" not in said

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"epochs": 2}, "epochs: expected more than the 2 that are trained, got 2"),
            ({"epochs": 1}, "epochs: expected more than the 2 that are trained, got 1"),
            ({}, "epochs: expected more than the 2 that are trained, got 2"),
            ({"threads": 2}, "epochs: expected more than the 2 that are trained, got 2"),
            ({"epochs": 0}, "epochs: expected a whole number of at least 1"),
            ({"epochs": 5, "lr": 0.1}, "continue: expected only epochs, schedule_epochs, device"),
            ({"epochs": 5, "device": "meta"}, "device: expected auto, or a device"),
        ],
        ids=str,
    )
    def test_changes(self, changes, said, short, tmp_path):
        assert refused(short, tmp_path / "new", **changes).startswith(said)

    def test_no_change_of_an_unfinished_run(self, stopped, tmp_path):
        said = refused(stopped, tmp_path / "new")
        assert said.endswith(f"to finish that run itself: diversevit run --resume {stopped}")

    def test_other_data(self, short, tmp_path):
        old = shutil.copytree(short, tmp_path / "old")
        record = json.loads((old / "config.json").read_text())
        record["splits"]["train"]["sha256"] = "0"
        write_record(old / "config.json", record)
        assert "other data" in refused(old, tmp_path / "new", epochs=5)

    def test_a_changed_configuration(self, short, tmp_path):
        old = shutil.copytree(short, tmp_path / "old")
        path = old / "config.json"
        path.write_text(path.read_text().replace('"batch_size": 4', '"batch_size": 2'))
        said = refused(old, tmp_path / "new", epochs=5)
        assert said.startswith(f"continue: expected {path} as the run wrote it")

    @pytest.mark.parametrize(
        "change",
        [{"epochs": 3}, {"learning_rate_factors": [1]}, {"changed": None}, {"continued_from": []}],
        ids=str,
    )
    def test_a_damaged_entry_of_a_run_that_was_continued(self, change, further, tmp_path):
        old = shutil.copytree(further, tmp_path / "old")
        record = json.loads((old / "config.json").read_text())
        record["continued_from"] |= change
        write_record(old / "config.json", record)
        said = refused(old, tmp_path / "new", epochs=6)
        assert said.startswith("continued_from: expected the entry of a continued run, got")

    def test_a_run_that_another_process_works_on(self, stopped, tmp_path):
        with Lock() as lock:
            lock.take(stopped)
            said = refused(stopped, tmp_path / "new", epochs=6)
        assert re.match(r"continue: expected a run that nobody works on, got .* is at work", said)

    def test_no_run(self, tmp_path):
        said = refused(tmp_path / "nothing", tmp_path / "new", epochs=6)
        assert said.startswith("continue: expected the folder of a run, got")

    def test_a_folder_that_exists(self, short, tmp_path):
        (tmp_path / "new").mkdir()
        with pytest.raises(UsageError, match="out: expected a new folder"):
            onward(short, tmp_path / "new", epochs=5)


class TestCommandLine:
    def call(self, *words: object, code: int, capsys) -> str:
        with pytest.raises(SystemExit) as end:
            main(["run", *map(str, words)])
        said = capsys.readouterr()
        assert end.value.code == code, said.err
        return said.out if code == 0 else said.err

    def test_more_epochs(self, short, further, tmp_path, capsys):
        said = self.call(
            *("--continue", short, "--epochs", 5, "--out", tmp_path / "out"), code=0, capsys=capsys
        )
        assert "learning rate: times 0.1 from epoch 2, times 0.01 from epoch 3" in said
        assert contents(tmp_path / "out") == contents(further)

    def test_resume_names_the_new_way(self, stopped, capsys):
        said = self.call("--resume", stopped, "--threads", 2, code=2, capsys=capsys)
        assert said == (
            "error: resume: expected no other option, got --threads; the run folder holds the settings; to train it "
            f"further in a new folder: --continue {stopped} with --threads\n"
        )
        said = self.call("--resume", stopped, "--lr", 1, code=2, capsys=capsys)
        assert "--continue" not in said

    def test_resume_of_a_finished_run_names_it(self, short, capsys):
        said = self.call("--resume", short, code=2, capsys=capsys)
        assert f"for more epochs: --continue {short} --epochs N" in said

    def test_another_recipe_is_another_run(self, short, capsys):
        said = self.call("--continue", short, "--lr", 1, "--epochs", 5, code=2, capsys=capsys)
        assert said.startswith("error: continue: expected only --epochs, --schedule-epochs, ")
        assert "got --lr; the rest is the old run's; for another recipe" in said
        assert said.count("\n") == 1


def test_old_configurations_kept_no_checkpoints(stopped, tmp_path):
    """A run that an older version began ends as it would have there."""
    record = json.loads((stopped / "config.json").read_text())
    del record["settings"]["keep_checkpoints"], record["settings"]["schedule_epochs"]
    write_record(stopped / "config.json", record)
    out = resume(stopped, console=quiet())
    assert not (out / "checkpoints").exists()
    assert Settings.from_json(record["settings"]).schedule == 5
