"""Whatever a command is given: exit code 0, 2 or 130, one line on an error, nothing half written.

Options, keys and files are taken from the code itself (typer's commands, the settings' fields, what lies in
a run's folder), so a new one is tried as it comes. No example trains: what would is cut off where all
checks have passed.
"""

import io
import json
import math
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
rich_console = pytest.importorskip("rich.console")
pytest.importorskip("typer")

from diversevit_fast.data import load_splits, mnist_cifar  # noqa: E402
from diversevit_fast.experiment import (  # noqa: E402
    Settings,
    doctor,
    machine,
    plots,
    resolve,
    run,
)
from diversevit_fast.experiment import trained_model as weights  # noqa: E402
from diversevit_fast.experiment.checkpoint import read, write_content  # noqa: E402
from diversevit_fast.experiment.config import MODEL_KEYS  # noqa: E402
from diversevit_fast.weight_files import read_tensors, write_tensors  # noqa: E402
from tests.helpers.fuzzing import (  # noqa: E402
    QUICK,
    VALUES,
    changed,
    command_lines,
    commands,
    damaged,
    odd_values,
    outcome,
    state_of,
)

COMMANDS = dict(commands())
TINY = json.loads(Path(__file__).with_name("tiny_run.json").read_text())
RUN = {**TINY, "methods": ["erm"], "seeds": [0], "epochs": 1}
WEIGHTS = "erm-seed0.safetensors"
USUAL = {  # so that most commands get far
    **{"method": "erm", "config": "{tmp}/tiny.json", "weights": f"{{tmp}}/run/{WEIGHTS}"},
    **{"folder": "{tmp}/run", "root": "{tmp}/none", "out": "{tmp}/new"},
}
TRAIN_EPOCH = sys.modules["diversevit_fast.experiment.train"]._train_epoch


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Data are few, pictures a few bytes, this machine small, the network gone; nothing trains."""
    runs, trains = (sys.modules[f"diversevit_fast.experiment.{name}"] for name in ("run", "train"))

    made = cache(load_splits)

    def few(name: str, *, samples: int | None, source: str | None, **options: Any) -> Any:
        small = 64 if samples is None or 64 < samples <= 1000 else samples
        load = (
            made if source is None else load_splits
        )  # a source's path says nothing of its content
        return load(name, samples=small, source=source, **options)

    class Absent:
        def __init__(self, *_: object, **__: object):
            raise RuntimeError("Dataset not found")

    absent = SimpleNamespace(MNIST=Absent, CIFAR10=Absent)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for module in (runs, weights):
            patch.setattr(module, "load_splits", few)
        patch.setattr(runs, "rehearse", lambda: None)
        patch.setattr(trains, "_train_epoch", interrupted)
        patch.setattr(machine, "_memory_of", lambda _: 10**8)
        patch.setattr(mnist_cifar, "require", lambda *_, **__: absent)
        patch.setattr(doctor, "self_check", lambda *_: (0.0, 1.0))
        for name in ("_curves", "_heads", "_cosines"):
            patch.setattr(plots, name, lambda *_: None)
        patch.setattr(plots, "_png", lambda _: b"a picture")
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A folder with a finished run, the same unfinished, and files of several kinds."""
    tmp = tmp_path_factory.mktemp("original")
    trains, runs = (sys.modules[f"diversevit_fast.experiment.{name}"] for name in ("train", "run"))
    kept = tmp / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trains, "_train_epoch", TRAIN_EPOCH)
        run(resolve(RUN), tmp / "run", console=rich_console.Console(file=io.StringIO()))
        patch.setattr(runs, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(resolve(RUN), kept, console=rich_console.Console(file=io.StringIO()))
    (tmp / "tiny.json").write_text(json.dumps(RUN))
    (tmp / "text").write_text("no JSON, no weights, no archive")
    (tmp / "deep.json").write_text("[" * 10**5)
    (tmp / "twice.json").write_text('{"epochs": 1, "epochs": 2}')
    (tmp / "loop").symlink_to("loop")
    return tmp


@contextmanager
def a_copy(original: Path) -> Iterator[Path]:
    """A copy of ``original`` that is the working folder."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name, "tmp")
        shutil.copytree(original, tmp, symlinks=True)
        os.mkfifo(tmp / "pipe")
        os.chdir(tmp)
        try:
            yield tmp
        finally:
            os.chdir(before)


def check(tmp: Path, line: list[str]) -> int:
    """Run a command in ``tmp``; a refusal leaves everything as it was, nothing leaves half a file."""
    before = state_of(tmp)
    code = outcome([word.replace("{tmp}", str(tmp)) for word in line])
    after = state_of(tmp)
    if code == 2:
        assert after == before, line
    assert not [name for name in after if name.endswith(".tmp")], line
    return code


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_options(words, original):
    @QUICK
    @given(command_lines(words, COMMANDS[words], USUAL))
    def law(line):
        with a_copy(original) as tmp:
            check(tmp, line)

    law()


def test_every_option_is_tried():
    """The law above is about all there are."""
    assert {"run", "train", "evaluate", "select-heads", "report", "doctor", "data prepare"} <= {
        " ".join(words) for words in COMMANDS
    }
    names = {p.name for command in COMMANDS.values() for p in command.params}
    assert {"seed", "threads", "device", "config", "out", "resume", "save"} <= names


@pytest.mark.parametrize("name", [f.name for f in fields(Settings)] + list(MODEL_KEYS))
def test_every_key_with_every_odd_value(name, original):
    with a_copy(original) as tmp:
        for value in VALUES:
            tree = {"model": {**RUN["model"], name: value}} if name in MODEL_KEYS else {name: value}
            (tmp / "odd.json").write_text(json.dumps({**RUN, **tree}))
            check(tmp, ["run", "--config", "odd.json", "--out", "new"])
            shutil.rmtree(tmp / "new.partial", ignore_errors=True)


@QUICK
@given(st.sampled_from([f.name for f in fields(Settings)]), odd_values, odd_values, st.data())
def test_keys_of_the_configuration(original, name, value, other, data):
    tree = {**RUN, name: value}
    if name == "model":
        tree[name] = {data.draw(st.sampled_from(MODEL_KEYS)): value}
    if data.draw(st.booleans()):
        tree[data.draw(st.sampled_from([f.name for f in fields(Settings)]))] = other
    with a_copy(original) as tmp:
        (tmp / "odd.json").write_text(json.dumps(tree))
        check(tmp, ["run", "--config", "odd.json", "--out", "new"])
        check(tmp, ["evaluate", f"run/{WEIGHTS}", "--config", "odd.json"])


READERS = {  # the folder that each reads
    "report run": "run",
    f"evaluate run/{WEIGHTS}": "run",
    f"select-heads run/{WEIGHTS} --save small.safetensors": "run",
    "run --resume kept": "kept.partial",
    "run --resume kept.partial/": "kept.partial",
    "run --resume run": "run",
}


@QUICK
@given(st.sampled_from(sorted(READERS)), st.data())
def test_files_of_a_run(original, line, data):
    """Any file of a run's folder damaged, gone, or of another kind, for every command that reads it."""
    with a_copy(original) as tmp:
        folder = tmp / READERS[line]
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        _spoil(data.draw(st.sampled_from(found)), data)
        before = state_of(folder / "checkpoints")
        code = outcome(line.split())
        if code == 2 and "--resume" in line:
            assert state_of(folder / "checkpoints") == before
            assert not (tmp / "kept").exists()
        assert not list(tmp.rglob("*.tmp"))


def _spoil(path: Path, data: Any) -> None:
    kinds = ["bytes", "absent", "folder", "pipe", "loop", "empty"]
    kinds += ["tree"] * 6 if path.suffix in (".json", ".csv", ".safetensors", ".pt") else []
    kind = data.draw(st.sampled_from(kinds))
    content = path.read_bytes()
    if kind == "tree":
        CHANGES[path.suffix](path, data)
        return
    path.unlink()
    match kind:
        case "bytes":
            path.write_bytes(data.draw(damaged(content)))
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "empty":
            path.touch()


def _change_json(path: Path, data: Any) -> None:
    tree = json.loads(path.read_text())
    tree.pop("sha256", None)  # as older runs have it: each check has to bite by itself
    path.write_text(json.dumps(data.draw(changed(tree))))


def _change_csv(path: Path, data: Any) -> None:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    row, cell = (data.draw(st.integers(0, n - 1)) for n in (len(rows), len(rows[0])))
    rows[row][cell] = str(data.draw(odd_values.filter(lambda v: v != "\ud800" and v != 10**400)))
    path.write_text("\n".join(map(",".join, rows)), encoding="utf-8", errors="replace")


def _change_weights(path: Path, data: Any) -> None:
    metadata, tensors = read_tensors(path, "")
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(["config", "kept_heads"]))
        metadata[key] = json.dumps(data.draw(changed(json.loads(metadata[key]))))
    else:
        name = data.draw(st.sampled_from(sorted(tensors)))
        kinds = (torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)
        tensors[name] = data.draw(
            st.sampled_from(
                [tensors[name][None], tensors[name] * math.nan, *map(tensors[name].to, kinds)]
            )
        )
    write_tensors(path, tensors, metadata)


def _change_checkpoint(path: Path, data: Any) -> None:
    write_content(path, data.draw(changed(read(path))))


CHANGES: dict[str, Callable[[Path, Any], None]] = {
    ".json": _change_json,
    ".csv": _change_csv,
    ".safetensors": _change_weights,
    ".pt": _change_checkpoint,
}


HEADERS = (
    "{'descr': '|u1', 'fortran_order': False, 'shape': (78000000000,)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 28, 28)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (True,)}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': 8}",
    "{'descr': '|u1', 'fortran_order': False, 'shape': ()}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (8,)}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (8,)}",
    "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (8,)}",
    "{'descr': 'no dtype', 'fortran_order': 1, 'shape': (8,)}",
    "{" * 500,
    "[]",
)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    shapes = {"mnist_images": (28, 28), "cifar_images": (32, 32, 3)}
    found = {}
    for key in mnist_cifar.KEYS:
        name, _, what = key.split("_")
        tail = shapes.get(f"{name}_{what}", ())
        found[key] = np.arange(64, dtype=np.uint8).reshape(-1, *[1] * len(tail)) % 2
        found[key] = np.broadcast_to(found[key], (64, *tail)).copy()
    return found


@QUICK
@given(st.data())
def test_archives_of_data(original, arrays, data):
    """An archive whose one array has another header, another form or other bytes than it should."""
    key = data.draw(st.sampled_from(sorted(arrays)))
    parts = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array)
        parts[f"{name}.npy"] = file.getvalue()
    match data.draw(st.sampled_from(["header", "array", "bytes", "archive"])):
        case "header":
            header = data.draw(st.sampled_from(HEADERS)).encode().ljust(117) + b"\n"
            start = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little")
            parts[f"{key}.npy"] = start + header + arrays[key].tobytes()
        case "array":
            array = arrays[key]
            odd = [array[:0], array[:3], array[None], array + 2, array * 0, array.astype("f4")]
            file = io.BytesIO()
            np.save(file, data.draw(st.sampled_from(odd)))
            parts[f"{key}.npy"] = file.getvalue()
        case "bytes":
            parts[f"{key}.npy"] = data.draw(damaged(parts[f"{key}.npy"]))
    with a_copy(original) as tmp:
        kind = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        with zipfile.ZipFile(tmp / "data.npz", "w", kind) as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        if data.draw(st.booleans()):
            (tmp / "data.npz").write_bytes(data.draw(damaged((tmp / "data.npz").read_bytes())))
        line = ["--data", "mnist-cifar", "--source", "data.npz", "--samples", "8"]
        check(tmp, ["run", "--config", "tiny.json", *line, "--out", "new"])
