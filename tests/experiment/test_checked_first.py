"""Values beyond reason: one line before any work, whichever way they come in."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("typer")
pytest.importorskip("rich")

from diversevit_fast.data import MNISTCIFAR, mnist_cifar
from diversevit_fast.errors import UsageError, require
from diversevit_fast.experiment import Settings, machine, resolve
from diversevit_fast.experiment.cli import main
from diversevit_fast.models import DiverseViT
from diversevit_fast.models.sizes import MOST_PARAMETERS, parameters, training_bytes
from diversevit_fast.weight_files import read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
SMALL = {"patch_size": 16, "dim": 4, "depth": 2, "num_heads": 2, "head_dim": 3, "mlp_dim": 5}
RUNS = {  # options of ``run`` -> what is said
    "seed": (["--seed", 10**14], "seeds: expected different whole numbers from 0 to 2**32 - 1"),
    "seeds": (["--seeds", 10**9], "seeds: expected a number of seeds, at least 1 and at most 1000"),
    "batch size": (["--batch-size", 10**30], "batch_size: expected a whole number of at least 1"),
    "every": (["--every", 10**30], "every: expected a whole number of at least 1"),
    "epochs": (["--epochs", 10**30], "epochs: expected a whole number of at least 1"),
    "samples": (["--samples", 7], "samples: expected a positive even number"),
    "threads": (["--threads", 5000], "threads: expected a whole number from 1 to 1024, got 5000"),
    "more threads": (["--threads", 10**30], "threads: expected a whole number from 1 to 1024"),
    "rate": (["--lr", "1e400"], "lr: expected a number above 0, of at most 1e30, got inf"),
    "weight": (["--penalty-weight", "nan"], "penalty_weight: expected a number of at least 0"),
    "device without numbers": (["--device", "meta"], "device: expected auto, or a device"),
    "device of a plugin": (["--device", "hpu"], "device: expected auto, or a device"),
    "out of nothing": (["--out", ""], "out: expected the name of a folder, got ''"),
    "out here": (["--out", "."], "out: expected a new folder"),
    "out at the top": (["--out", "/"], "out: expected"),
    "resume nothing": (["--resume", ""], "resume: expected the folder of a run, got ''"),
    "resume here": (["--resume", "."], "resume: expected an unfinished run"),
    "source of nothing": (["--source", ""], "source: expected a path, got ''"),
    "endless config": (["--config", "/dev/zero"], "config: expected a readable file"),
    "folder as config": (["--config", "."], "config: expected a readable file"),
    "pipe as config": (["--config", "pipe"], "config: expected a readable file"),
    "large config": (["--config", "large"], "(more than 67108864 bytes)"),
}
CONFIGS = {  # text of a configuration -> what is said
    "rate": ('{"lr": 1%s}' % ("0" * 400), "lr: expected a number above 0"),
    "width": ('{"model": {"dim": 1000000000000}}', "dim: expected an integer from 1 to 1048576"),
    "depth": ('{"model": {"depth": 1000000}}', "depth: expected an integer from 1 to 1000"),
    "all of it": (
        '{"model": {"dim": 1048576, "mlp_dim": 1048576}}',
        "expected a model of at most 1e+11 parameters",
    ),
    "memory": ('{"model": {"dim": 50000, "depth": 100}}', "model: expected a model that fits"),
    "word": ('{"model": {"dim": "x"}}', "dim: expected an integer"),
    "switch": ('{"model": {"last_residual": 1}}', "last_residual: expected True or False"),
    "patches": ('{"model": {"patch_size": 5}}', "image_size: expected"),
    "nested": ("[" * 10**5, "(nested too deeply)"),
    "twice": ('{"epochs": 1, "epochs": 2}', "the key 'epochs' is there twice"),
    "digits": ('{"epochs": 1%s}' % ("0" * 5000), "config: expected a JSON file"),
    "unknown keys": (json.dumps({f"key{i}": 0 for i in range(5000)}), "and 4997 more"),
    "NUL": ('{"source": "\\u0000"}', "source: expected a path"),
    "surrogate": ('{"source": "\\ud800"}', "source: expected a path"),
}


def refused(arguments: list, capsys) -> str:
    """The one line with which a command refuses."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len(said) < 5000
    return said


@pytest.fixture
def idle(tmp_path, monkeypatch) -> Path:
    """An empty working folder; loading data would be work."""

    def work(*_, **__):
        raise AssertionError("data were loaded")

    monkeypatch.setattr(sys.modules["diversevit_fast.experiment.run"], "load_splits", work)
    monkeypatch.setattr(machine, "_memory_of", lambda _: 10**10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RUNS)
def test_options_of_run(name, idle, capsys):
    os.mkfifo(idle / "pipe")
    with open(idle / "large", "wb") as large:
        large.truncate(2**30)
    arguments, said = RUNS[name]
    assert said in refused(["run", *arguments], capsys)
    assert {path.name for path in idle.iterdir()} == {"pipe", "large"}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, idle, capsys):
    text, said = CONFIGS[name]
    (idle / "config.json").write_text(text)
    assert said in refused(["run", "--config", "config.json", "--out", "new"], capsys)
    assert [path.name for path in idle.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "values",
    [
        {"seeds": (2**32 - 1,), "data_seed": 2**63 - 1, "threads": 1024, "lr": 1e30},
        {"seeds": tuple(range(1000)), "every": 10**9, "penalty_weight": 10**18, "lr": 1},
    ],
    ids=str,
)
def test_the_largest_values_are_taken(values):
    assert resolve(values).seeds == values["seeds"]


def test_seeds_end_where_a_generator_repeats_itself():
    draws = [torch.rand(3, generator=torch.Generator().manual_seed(n)) for n in (0, 2**32)]
    assert draws[0].equal(draws[1])
    with pytest.raises(UsageError, match="seeds: expected"):
        Settings(seeds=(2**32,))


def test_threads_that_do_not_start_are_said_before_openmp_aborts(monkeypatch):
    machine.check_threads(64)
    started = []

    def start(thread):
        started.append(thread)
        if len(started) > 5:
            raise RuntimeError("can't start new thread")
        real(thread)

    real = machine.threading.Thread.start
    monkeypatch.setattr(machine.threading.Thread, "start", start)
    with pytest.raises(UsageError, match=r"threads: expected as many .* got 64; use --threads 2"):
        machine.check_threads(64)
    assert not any(thread.is_alive() for thread in started)


class TestSizes:
    @pytest.mark.parametrize(
        "changes", [{}, SMALL, {**SMALL, "channels": 1, "num_classes": 7}], ids=str
    )
    def test_parameters_are_counted_without_a_model(self, changes):
        model = DiverseViT(**changes)
        assert parameters(model.config) == sum(p.numel() for p in model.parameters())

    def test_least_memory_of_training(self):
        """What a step really keeps is more than what is asked for, and not by orders of magnitude."""
        model = DiverseViT()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            model(torch.rand(4, 3, 64, 32))
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
        for parameter in model.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
        least = training_bytes(model.config, 4) - 16 * parameters(model.config)
        assert least <= sum(storages.values()) <= 4 * least

    def test_a_model_beyond_reason_is_never_begun(self):
        begun = time.process_time()
        for sizes in ({"dim": 10**12}, {"depth": 10**6}, {"dim": 2**20, "mlp_dim": 2**20}):
            with pytest.raises(UsageError):
                DiverseViT(**sizes)
        assert time.process_time() - begun < 1
        assert MOST_PARAMETERS == 10**11


@pytest.fixture
def saved(tmp_path) -> Path:
    DiverseViT(**SMALL).save(tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("command", ["evaluate", "select-heads"])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dim", 10**12, "dim: expected an integer from 1 to 1048576"),
        ("depth", 10**6, "depth: expected an integer from 1 to 1000"),
        ("num_heads", 10**9, "num_heads: expected an integer from 1 to 1000"),
        ("image_size", [2**20, 2**20], "expected pos_embed of shape [1, 4294967297, 4]"),
        ("image_size", 7, "image_size: expected"),
        ("dim", "nested", "one that does not parse (RecursionError)"),
    ],
)
def test_sizes_in_the_metadata_of_weights(key, value, said, command, saved, capsys):
    metadata, tensors = read_tensors(saved, "")
    text = json.dumps({**json.loads(metadata["config"]), key: value})
    metadata["config"] = text.replace('"nested"', "[" * 10**5)
    write_tensors(saved, tensors, metadata)
    assert said in refused([command, saved], capsys)


@pytest.mark.parametrize("command", ["evaluate", "select-heads"])
def test_weights_that_do_not_fit_the_data(command, tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    for changes, said in (
        ({"num_classes": 1}, "data: expected 1 classes, as the model's, got 2"),
        ({"channels": 1}, "data: expected images [1, 64, 32], as the model's, got [3, 64, 32]"),
    ):
        DiverseViT(**{**SMALL, **changes}).save(path)
        assert said in refused([command, path, "--samples", 8], capsys)
    DiverseViT(**SMALL).double().save(path)
    assert "weights: expected tensors of dtype torch.float32" in refused([command, path], capsys)
    model = DiverseViT(**SMALL)
    model.head.bias.data[0] = torch.nan
    model.save(path)
    assert "NaN or infinity in head.bias" in refused([command, path], capsys)


@pytest.mark.parametrize("option", [["--search", "all"], ["--score", "luck"], ["--save", ""]])
def test_select_heads_asks_before_it_reads(option, tmp_path, capsys):
    said = refused(["select-heads", tmp_path / "none.safetensors", *option], capsys)
    assert said.startswith(f"error: {option[0][2:]}: expected ")


HEADERS = {
    "78 GB": ("|u1", "(78000000, 32, 32, 3)", "at most 1000000 items in cifar_test_images"),
    "objects": ("|O", "(8, 32, 32, 3)", "holds Python objects"),
    "floats": ("<f8", "(8, 32, 32, 3)", "got float64 [8, 32, 32, 3]"),
    "one axis": ("|u1", "(10,)", "got uint8 [10]"),
    "negative": ("|u1", "(-8, 32, 32, 3)", "at most 1000000 items"),
    "too few bytes": ("|u1", "(8, 32, 32, 3)", "expected a readable .npz archive"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_the_header_of_an_array_claims(name, tmp_path, monkeypatch):
    descr, shape, said = HEADERS[name]
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    claim = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()
    path = tmp_path / "data.npz"
    file = io.BytesIO()
    with zipfile.ZipFile(path, "w") as archive:
        for key in mnist_cifar.KEYS:
            tail = {"mnist": (28, 28), "cifar": (32, 32, 3)}[key.partition("_")[0]]
            file = io.BytesIO()
            np.save(file, np.zeros((8, *(tail if key.endswith("images") else ())), np.uint8))
            odd = key == "cifar_test_images"
            archive.writestr(f"{key}.npy", claim + b"few" if odd else file.getvalue())
    with pytest.raises(UsageError) as error:
        MNISTCIFAR(path, "test_id")
    assert said in str(error.value)


def test_an_archive_larger_than_memory_is_not_damaged(tmp_path):
    """A million images are allowed; where memory does not hold them, that is said."""
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in mnist_cifar.KEYS:
            count = 10**6 if key == "cifar_test_images" else 8
            tail = {"mnist": (28, 28), "cifar": (32, 32, 3)}[key.partition("_")[0]]
            shape = (count, *(tail if key.endswith("images") else ()))
            file = io.BytesIO()
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            archive.writestr(f"{key}.npy", file.getvalue() + bytes(8 * 3072))
    code = f"""
import resource, torch
from diversevit_fast.data import MNISTCIFAR
from pathlib import Path
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
try:
    MNISTCIFAR({str(path)!r}, "test_id")
except ValueError as error:
    print(error)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "too little memory for it" in run.stdout, run.stderr


LAUNCH = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "::",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {name: value}
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
            for value in ("x", "-1", "")
        ),
        *({"MASTER_PORT": port} for port in ("abc", "0", "65536", "1" * 5000, "²")),
        *({"RANK": "2"}, {"WORLD_SIZE": "0"}),
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_an_environment_that_no_launcher_makes(changes, idle, monkeypatch, capsys):
    for name, value in {**LAUNCH, **changes}.items():
        monkeypatch.setenv(name, value)
    said = refused(["run", "--out", "new"], capsys)
    assert said.startswith("error: ranks: expected what torchrun sets, got ")
    assert "; start with torchrun, or unset RANK, WORLD_SIZE" in said
    assert not list(idle.iterdir())


def test_ranks_that_cannot_meet(idle, monkeypatch, capsys):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)

    def fail(_):
        raise torch.distributed.DistNetworkError("The server socket has failed\nto listen")

    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    said = refused(["run", "--out", "new"], capsys)
    assert "ranks: expected the others at :::1, got The server socket has failed; start" in said


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("int('x')", "ValueError"),
        ("raise ImportError('libxcb.so.1: cannot open it')", r"ImportError: libxcb.so.1: cannot"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_a_package_that_fails_when_it_is_imported(source, got, tmp_path, monkeypatch):
    (tmp_path / "brittle.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brittle", raising=False)
    expected = rf"^brittle: expected a package that can be imported, got {got}"
    with pytest.raises(UsageError, match=expected):
        require("brittle", extra="train")
