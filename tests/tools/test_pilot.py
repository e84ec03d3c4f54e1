"""The pilot: what it measures, what it chooses, and that it goes on where it was killed."""

import json

import pytest
import torch

from tools.pilot import __main__ as pilot
from tools.pilot import choose
from tools.pilot.cells import Cell, heads_of, measure, measure_missing, read_lines

pytest.importorskip("sklearn")
pytest.importorskip("rich")

MODEL = {"patch_size": 16, "dim": 16, "depth": 2, "num_heads": 3, "head_dim": 8, "mlp_dim": 16}
TINY = {"samples": 64, "model": MODEL, "batch_size": 32}


class Heads:
    """Predicts what it is given: class per head and image."""

    def __init__(self, classes):
        self.classes = torch.tensor(classes)

    def head_logits(self, images):
        everything = torch.zeros(1, len(images), 2)
        return torch.cat([everything, torch.nn.functional.one_hot(self.classes, 2).float()])


class Images:
    def __init__(self, labels):
        self.labels = torch.tensor(labels)
        self.images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
        self.groups = torch.zeros(len(labels), dtype=torch.int64)

    def __len__(self):
        return len(self.labels)


def test_the_best_head_is_measured_where_it_was_not_chosen():
    labels = [0, 0, 1, 1, 0, 0, 1, 1]
    on_even = [0, 1, 1, 0, 0, 1, 1, 0]  # right on the even images, wrong on the odd ones
    alternating = [1 - one for one in on_even]
    constant = [0] * 8
    found, live = heads_of(Heads([on_even, alternating, constant]), Images(labels))
    assert (found, live) == (0.0, 2)
    found, live = heads_of(Heads([labels, constant]), Images(labels))
    assert (found, live) == (1.0, 1)


def test_cells_are_measured_once(tmp_path):
    path = tmp_path / "new" / "cells.jsonl"
    cells = [
        Cell(kind, 0.9, 1e-3, 1, 7, weight)
        for kind, weight in (("erm", 0.0), ("core", 0.0), ("diversevit", 10.0))
    ]
    lines = measure_missing(cells[:2], path, **TINY)
    assert [line["kind"] for line in lines] == ["erm", "core"]
    assert not any("test" in key for line in lines for key in line)
    whole = path.read_text()
    path.write_text(whole[:-10])  # killed while it wrote the second
    again = measure_missing(cells, path, **TINY)
    assert len(again) == len(read_lines(path)) == 3
    assert path.read_text().startswith(whole.splitlines()[0])
    for key in ("all", "head", "selected", "live"):
        assert again[1][key] == lines[1][key]
    measure_missing(cells, path, **TINY)
    assert len(read_lines(path)) == 3


def test_a_cell_trains_what_it_says(monkeypatch):
    seen = {}

    def spy(settings, task, splits, *rest):
        seen[task.method] = settings, splits["train"]
        raise InterruptedError

    monkeypatch.setattr("tools.pilot.cells.train", spy)
    for kind in ("erm", "core", "diversevit"):
        with pytest.raises(InterruptedError):
            measure(Cell(kind, 1.0, 3e-4, 5, 9, 2.0), **TINY)
        settings, split = seen.pop("diversevit" if kind == "diversevit" else "erm")
        assert (settings.lr, settings.erm_lr, settings.epochs) == (3e-4, 3e-4, 5)
        assert (settings.penalty_weight, settings.correlation) == (2.0, 1.0)
        assert (split.images[:, :, :32].max() == 0) == (kind == "core")
        assert (split.labels == split.digits).all()


def line(kind, correlation=0.9, lr=1e-3, **measured):
    rest = {"all": 0.5, "head": 0.6, "selected": 0.6, "live": 4, "penalty_weight": 0.0}
    return {"kind": kind, "correlation": correlation, "lr": lr, **rest, **measured}


CORE = [line("core", all=0.8), line("core", all=0.9), line("core", lr=3e-4, all=0.7)]


@pytest.mark.parametrize(
    ("cells", "chosen", "why"),
    [
        ([line("erm", 0.9), line("erm", 1.0, selected=0.55)], (1.0, 1e-3), "headroom (0.300)"),
        ([line("erm", 0.9), line("erm", 0.9, 3e-4, selected=0.5)], (0.9, 1e-3), "(0.250)"),
        (
            [line("erm", 0.9), line("erm", 1.0, selected=0.5, all=0.56)],
            (0.9, 1e-3),
            "best head at least",
        ),
        ([line("erm", 0.9), line("erm", 1.0, selected=0.5, live=2)], (0.9, 1e-3), "best head at"),
        ([line("erm", 0.9), line("erm", 1.0, selected=0.5, head=0.54)], (0.9, 1e-3), "best head"),
        ([line("erm", 0.9, head=0.5), line("erm", 1.0, head=0.5, live=2)], (0.9, 1e-3), "3 live"),
        ([line("erm", 0.9, live=1), line("erm", 1.0, live=1, selected=0.5)], (1.0, 1e-3), "0.55"),
        ([line("erm", 0.9, all=0.7), line("erm", 1.0, all=0.6)], (1.0, 1e-3), "no cell"),
        (
            [line("erm", 0.9, live=2), line("erm", 0.9, live=4), line("erm", 1.0, selected=0.7)],
            (0.9, 1e-3),
            "(0.250)",
        ),
    ],
)
def test_the_regime_follows_the_rule(cells, chosen, why):
    *found, said = choose.choose_regime([*CORE, *cells])
    assert tuple(found) == chosen
    assert why in said


def test_the_weight_is_the_best_selected_the_smallest_at_a_tie():
    lines = [
        line("diversevit", penalty_weight=weight, selected=selected)
        for weight, selected in ((10.0, 0.7), (1.0, 0.7), (0.1, 0.6), (100.0, 0.5), (100.0, 0.8))
    ]
    lines.append(line("diversevit", 1.0, penalty_weight=0.1, selected=0.9))
    assert choose.choose_weight(lines, 0.9, 1e-3) == 1.0


def test_the_program_shares_its_work_and_says_what_it_chose(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.pilot.cells.measure", lambda cell: made(cell))

    def made(cell):
        accuracy = 0.6 + cell.penalty_weight / 1000 if cell.kind == "diversevit" else 0.6
        base = 0.8 if cell.kind == "core" else 0.5
        return {**vars(cell), "all": base, "head": 0.6, "selected": accuracy, "live": 4}

    files = [str(tmp_path / name) for name in ("a", "b", "c")]
    assert pilot.main(["erm", files[0], "--seeds", "100"]) == 0
    assert pilot.main(["core", files[1], "--seeds", "101"]) == 0
    assert len(read_lines(tmp_path / "a")) == 4 * 2
    assert len(read_lines(tmp_path / "b")) == 2
    assert {entry["seed"] for entry in read_lines(tmp_path / "b")} == {101}
    pilot.main(["core", files[2], "--lr", "3e-4"])
    assert [entry["lr"] for entry in read_lines(tmp_path / "c")] == [3e-4]
    pilot.main(["penalty", files[2], "--correlation", "0.9", "--lr", "3e-4"])
    capsys.readouterr()
    assert pilot.main(["choose", *files]) == 0
    said = capsys.readouterr().out
    assert "correlation 0.9, learning rate 0.0003: largest headroom (0.200)" in said
    assert "penalty weight 100" in said
    assert "| diversevit | 0.9 | 0.0003 | 100 | 0.500 | 0.600 | 0.700 | 4.0 |  |" in said
    with pytest.raises(SystemExit):
        pilot.main(["penalty", files[2]])
    assert json.loads((tmp_path / "c").read_text().splitlines()[1])["penalty_weight"] == 0.1
