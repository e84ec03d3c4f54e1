"""What a sweep prepares once: files of splits that every process maps, and what becomes of them."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("typer")

from diversevit_fast.data import load_splits
from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import Grid, prepared_data, run_sweep
from diversevit_fast.experiment.config import read_config, resolve
from diversevit_fast.experiment.run import Interrupted, fingerprint
from diversevit_fast.experiment.sweep import Hands, resume_sweep
from diversevit_fast.experiment.sweep_work import Shelf, data_key
from diversevit_fast.files import FileError
from tests.experiment.test_sweep import page
from tests.helpers.interrupts import interrupted_after_an_epoch

CONFIG = Path(__file__).with_name("tiny_run.json")
RUNS = sys.modules["diversevit_fast.experiment.run"]


@pytest.fixture
def splits():
    return load_splits("digits-photos", samples=8)


def sources(path: Path) -> Path:
    """A file of the kind that mnist-cifar and garments-places read, of 40 random images of each class."""
    random, arrays = np.random.default_rng(0), {}
    shapes = {"mnist": (28, 28), "cifar": (32, 32, 3), "garments": (28, 28), "places": (32, 32, 3)}
    for name, shape in shapes.items():
        for part in ("train", "test"):
            arrays[f"{name}_{part}_images"] = random.integers(0, 256, (80, *shape), dtype=np.uint8)
            arrays[f"{name}_{part}_labels"] = np.arange(80, dtype=np.uint8) % 2
    np.savez(path, **arrays)
    return path


def folder(path: Path) -> Path:
    from PIL import Image

    rows = ["filename,split,y,a"]
    for i in range(96):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path / f"{i}.png")
        rows.append(f"{i}.png,{('train', 'val', 'test')[i % 3]},{i // 3 % 2},{i // 6 % 2}")
    (path / "metadata.csv").write_text("\n".join(rows))
    return path


def data_set(name: str, path: Path):
    if name == "folder":
        return load_splits(name, source=folder(path))
    if name == "digits-photos":
        return load_splits(name, samples=8, img_size=16)
    kept = ("mnist", "cifar") if name == "mnist-cifar" else ("garments", "places")
    whole = np.load(sources(path / "whole.npz"))
    np.savez(path / "some.npz", **{k: whole[k] for k in whole if k.startswith(kept)})
    return load_splits(name, source=path / "some.npz", samples=8)


@pytest.mark.parametrize("name", ["digits-photos", "mnist-cifar", "garments-places", "folder"])
def test_every_data_set_comes_back_whole(name, tmp_path):
    wanted = data_set(name, tmp_path)
    prepared_data.write_splits(tmp_path / "a.pt", wanted)
    found = prepared_data.read_splits(tmp_path / "a.pt")
    assert list(found) == list(wanted)
    for split in wanted:
        assert type(found[split]) is type(wanted[split])
        assert len(found[split]) == len(wanted[split])
        mine, theirs = vars(found[split]), vars(wanted[split])
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            same = torch.equal(mine[key], value) if torch.is_tensor(value) else mine[key] == value
            assert same, key
            assert type(mine[key]) is type(value)


def test_no_more_is_written_than_the_splits_hold(splits, tmp_path):
    splits["train"].images = torch.zeros(10_000, *splits["train"].images.shape[1:]).byte()[:8]
    prepared_data.write_splits(tmp_path / "a.pt", splits)
    assert (tmp_path / "a.pt").stat().st_size < 2 * sum(x.images.nbytes for x in splits.values())


def test_what_is_done_to_mapped_splits_does_not_reach_the_file(splits, tmp_path):
    path = tmp_path / "a.pt"
    prepared_data.write_splits(path, splits)
    before = path.read_bytes()
    prepared_data.read_splits(path)["train"].images.zero_()
    assert path.read_bytes() == before
    again = prepared_data.read_splits(path)["train"].images
    assert torch.equal(again, splits["train"].images)


@pytest.mark.parametrize("damage", ["a byte", "cut", "longer", "empty"])
def test_a_damaged_file_is_refused_in_one_line(damage, splits, tmp_path):
    path = tmp_path / "a.pt"
    prepared_data.write_splits(path, splits)
    data = bytearray(path.read_bytes())
    if damage == "a byte":
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-100], "longer": data + b"x", "empty": b""}.get(damage, data))
    wanted = (
        "^data: expected those that the sweep prepared in .*a.pt, got a damaged one, .*; delete it"
    )
    with pytest.raises(UsageError, match=wanted) as refused:
        prepared_data.read_splits(path)
    assert "\n" not in str(refused.value)


def test_a_foreign_file_is_refused(tmp_path):
    from diversevit_fast.experiment.run_files import write_sealed

    write_sealed(tmp_path / "a.pt", b"no tensors")
    with pytest.raises(UsageError, match=r"got one that PyTorch .* does not load"):
        prepared_data.read_splits(tmp_path / "a.pt")
    with pytest.raises(FileError):
        prepared_data.read_splits(tmp_path / "none.pt")


class Counting:
    """``load_splits`` of a run, that counts."""

    def __init__(self, splits):
        self.splits, self.calls = splits, 0

    def __call__(self, *_, **__):
        self.calls += 1
        return self.splits


@pytest.fixture
def counting(splits, monkeypatch):
    counting = Counting(splits)
    monkeypatch.setattr(RUNS, "load_splits", counting)
    monkeypatch.setattr(RUNS, "rehearse", lambda: None)
    monkeypatch.setattr(RUNS, "write_report", page)
    return counting


def settings():
    return resolve({}, CONFIG)


def test_another_process_finds_what_one_has_prepared(counting, tmp_path):
    first = Shelf({}, tmp_path / "data").load(settings())
    second = Shelf({}, tmp_path / "data").load(settings())
    assert counting.calls == 1
    assert {k: fingerprint(v) for k, v in first.items()} == {
        k: fingerprint(v) for k, v in second.items()
    }


def test_many_at_once(counting, tmp_path):
    """Each prepares, or finds a whole file; none finds a part of one."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Shelf({}, tmp_path / "data").load(settings()), range(16)))
    for splits in found:
        assert torch.equal(splits["train"].images, counting.splits["train"].images)
    assert [p.suffix for p in (tmp_path / "data").iterdir()] == [".pt"]


def test_the_file_of_other_data_is_refused(counting, tmp_path):
    Shelf({}, tmp_path / "data").load(settings())
    prints = {data_key(settings()): {"train": "another"}}
    with pytest.raises(UsageError, match=r"^data: expected what the sweep started with, got other"):
        Shelf(prints, tmp_path / "data").load(settings())


def grid() -> Grid:
    fixed = {k: v for k, v in read_config(CONFIG).items() if k not in ("seeds", "methods")}
    return Grid.of({"penalty_weight": [0.0, 1.0]}, seeds=[0, 1], **{**fixed, "epochs": 1})


def test_a_sweep_prepares_once_and_leaves_no_file(counting, tmp_path):
    done = run_sweep(grid(), tmp_path / "sweep", hands=Hands(workers=1), say=lambda line: None)
    assert (done.done, counting.calls) == (4, 1)
    assert not (tmp_path / "sweep" / "data").exists()


def test_an_interrupted_one_keeps_the_file_for_whoever_goes_on(counting, tmp_path):
    out, hands = tmp_path / "sweep", Hands(workers=1)
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        run_sweep(grid(), out, hands=hands, say=lambda line: None)
    (file,) = (out / "data").iterdir()
    done = resume_sweep(out, hands=hands, say=lambda line: None)
    assert (done.done, counting.calls) == (4, 1)
    assert not file.exists()


def test_a_damaged_file_stops_a_sweep_and_fails_no_cell(counting, tmp_path):
    out, hands = tmp_path / "sweep", Hands(workers=1)
    with interrupted_after_an_epoch(), pytest.raises(Interrupted):
        run_sweep(grid(), out, hands=hands, say=lambda line: None)
    (file,) = (out / "data").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match="delete it: the data are prepared again"):
        resume_sweep(out, hands=hands, say=lambda line: None)
    assert not list((out / "failed").iterdir())
    file.unlink()
    assert resume_sweep(out, hands=hands, say=lambda line: None).done == 4
    assert counting.calls == 2
