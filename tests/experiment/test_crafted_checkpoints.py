"""A checkpoint whose checksum is right and whose content is not what a run writes: refused, or the same end."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diversevit_fast.experiment import resume
from diversevit_fast.experiment.checkpoint import read, write_content
from tests.experiment.test_experiment import contents, quiet
from tests.experiment.test_run_folder import TASK, original, quick, refused, unbroken  # noqa: F401 (fixtures)

pytest.importorskip("typer")
GONE = object()
FIRST = ("optimizer", "state", 0)
OTHERS: list[Any] = [GONE, None, [], {}, "x", -1, 10**30, True, torch.zeros(2)]
TENSORS: list[Callable] = [
    *(lambda x: x[None], torch.Tensor.double, torch.Tensor.half, torch.Tensor.long),
    *(lambda x: x.to(torch.complex64), lambda x: x.expand(2, *x.shape), lambda x: x.to("meta")),
]
PLACES: list[tuple] = [  # where anything else is no checkpoint of the run
    *(("format",), ("run",), ("epoch",), ("rows",), ("rows", 0), ("rows", -1), ("best",)),
    *(("rows", 3, name) for name in ("method", "seed", "epoch", "split", "heads", "accuracy")),
    *(("best", "epoch"), ("best", "weights"), ("best", "weights", "head.bias"), ("cosines",)),
    *(("cosines", "before"), ("cosines", "after"), ("cosines", "after", 0, 1), ("model",)),
    *(("model", "cls_token"), ("optimizer",), ("optimizer", "state"), FIRST),
    *((*FIRST, "step"), (*FIRST, "exp_avg"), (*FIRST, "exp_avg_sq")),
]


def put(content: Any, place: tuple, change: Callable[[Any], Any]) -> Any:
    """A copy of ``content`` in which ``place`` is changed."""
    found = content = copy.deepcopy(content)
    for key in place[:-1]:
        found = found[key]
    value = change(found[place[-1]])
    if value is GONE:
        del found[place[-1]]
    else:
        found[place[-1]] = value
    return content


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory) -> Path:  # noqa: F811
    return shutil.copytree(original, tmp_path_factory.mktemp("crafted") / "out.partial")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_another_thing_in_its_place(place, folder):
    path = folder / f"checkpoints/{TASK}.pt"
    whole, content = path.read_bytes(), read(path)
    value = content
    for key in place:
        value = value[key]
    changes = [lambda _, other=other: other for other in OTHERS if type(other) is not type(value)]
    if isinstance(value, torch.Tensor):
        changes += [*TENSORS, lambda _: torch.zeros(3)]
    if isinstance(value, dict) and place != ("optimizer",):  # what it holds besides is not taken
        changes += [lambda v: {**v, "more": 1}, lambda v: {**v, 10**6: 1}]
    if isinstance(value, list):
        changes += [lambda v: v * 2, tuple, lambda v: v[1:]]
    if isinstance(value, int):
        changes += [lambda v: v + 7, lambda _: -1, lambda _: 10**30]
    if isinstance(value, float) and "accuracy" in place:
        changes += [lambda v: v * torch.nan]
    for change in changes:
        crafted = put(content, place, change)
        write_content(path, crafted)
        assert f"{path}, got " in refused(folder), change
        assert read(path).keys() == crafted.keys()  # it lies where it lay
    path.write_bytes(whole)


def test_what_the_optimizer_was_told_is_the_settings_say(folder, unbroken, tmp_path):  # noqa: F811
    """Say by another version of PyTorch, whose optimizer has other options."""
    content = read(folder / f"checkpoints/{TASK}.pt")
    for number, groups in enumerate(
        ([{"lr": 3.0, "betas": "x", "amsgrad": True}], [], None, content["optimizer"])
    ):
        copied = shutil.copytree(folder, tmp_path / f"{number}.partial")
        crafted = put(content, ("optimizer", "param_groups"), lambda _, groups=groups: groups)
        write_content(copied / f"checkpoints/{TASK}.pt", crafted)
        assert contents(resume(copied, console=quiet())) == contents(unbroken)
