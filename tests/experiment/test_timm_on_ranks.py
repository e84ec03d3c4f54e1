"""Two real gloo ranks train a model of timm as one process does: DDP, FSDP2, resuming. Run as a script, a rank."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from diversevit_fast.experiment import resolve, resume, run
from tests.experiment.test_distributed_train import (
    TOLERANCE,
    in_float64,
    launch,
    quiet,
    rows,
    stop,
)
from tests.experiment.test_distributed_train import pytestmark as needs_gloo

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = [needs_gloo, pytest.mark.slow]

# 64 images in batches of 21: shares of 11 and 10, and a last batch smaller than the ranks
TINY = {
    **{"samples": 64, "epochs": 2, "batch_size": 21, "threads": 1, "workers": 1, "device": "cpu"},
    **{"methods": ("diversevit",), "seeds": (0,), "architecture": "timm:test_vit", "img_size": 32},
    **{"layers": "all", "lr": 1e-3},
}


def settings(**changes):
    return resolve({**TINY, **changes})


def train_all(folder: Path, rank: int) -> None:
    with in_float64():
        run(settings(), folder / "ddp", console=quiet())
        stop(settings(fsdp=True), folder / "fsdp", rank)
        resume(folder / "fsdp", console=quiet())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name} {name}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.load_file(path).items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What two ranks trained, and in ``alone`` this process."""
    folder = tmp_path_factory.mktemp("ranks")
    for code, _, errors in launch(__file__, str(folder), limit=900):
        assert code == 0, errors
    with in_float64():
        run(settings(), folder / "alone", console=quiet())
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_repeat_one_process(name, trained):
    """Uninterrupted, or stopped in the second epoch and resumed."""
    found, wanted = weights(trained / name), weights(trained / "alone")
    assert any("attn.qkv" in key for key in wanted)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    for one, other in zip(rows(trained / name), rows(trained / "alone"), strict=True):
        for column, value in other.items():
            if value and column in ("accuracy", "worst_group", "loss", "penalty"):
                assert float(one[column]) == pytest.approx(float(value), rel=1e-8, abs=1e-10)
            else:
                assert one[column] == value


def test_a_frozen_trunk_is_refused(tmp_path):
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    chosen = {
        **TINY,
        "layers": "last",
        "freeze_below": "last",
        "pretrained": str(tmp_path / "w.pth"),
    }
    (tmp_path / "frozen.json").write_text(json.dumps(chosen))
    command = ("-m", "diversevit_fast.experiment.cli", "run", "--config", tmp_path / "frozen.json")
    first, second = launch(*map(str, command), "--out", str(tmp_path / "out"), limit=900)
    said = (
        "error: freeze_below: expected a model that is trained whole on several ranks, got 'last'"
    )
    assert first[2].startswith(said), first[2]
    assert first[2].count("\n") == 1
    assert (first[0], second) == (2, (2, "", ""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frozen.json", "w.pth"]


if __name__ == "__main__":
    train_all(Path(sys.argv[1]), int(os.environ["RANK"]))
