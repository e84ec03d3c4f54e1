"""The recipe for several machines, on two that are this one: a lost process, fewer machines, one process."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests.docs.test_examples import EXAMPLES, ROOT, data, plain, vit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs gloo",
    ),
]
LIMIT = 900
"""Seconds of a launch, which takes some 40 of processor time: machines that run tests may be busy."""

RANK = """
import gc, os, signal, sys
from pathlib import Path
sys.path[:0] = [{examples!r}, {root!r}]
import torch
import torch.distributed as dist
import tiny
import torchrun_multinode as recipe

folder, runs = Path(sys.argv[1]), sys.argv[2:]
again = (folder / "lost" / "step-000004").exists()
vit, dataset = tiny.vit, tiny.dataset

def double(samples=64):
    images, labels = dataset(samples).tensors
    return torch.utils.data.TensorDataset(images.double(), labels)

tiny.vit, tiny.dataset = lambda: vit().double(), double
dist.init_process_group("gloo")
steps, clip = [0], torch.nn.utils.clip_grad_norm_

def count(*args):
    steps[0] += 1
    if steps[0] == 6 and name == "lost" and not again and dist.get_rank() == 3:
        os.kill(os.getpid(), {kill})
    return clip(*args)

torch.nn.utils.clip_grad_norm_ = count
for name in runs:
    steps[0] = 0
    kept = folder / name if name in ("lost", "fewer") else None
    model = recipe.run(torch.device("cpu"), "all" if name == "all" else "machine", kept)
    whole = {{n: p.full_tensor().detach() for n, p in model.named_parameters()}}
    if dist.get_rank() == 0:
        shape = list(next(model.parameters()).device_mesh.shape)
        torch.save((whole, steps[0], shape), folder / f"{{name}}.pt")
    del model
gc.collect()
dist.destroy_process_group()
"""


def machines(count: int, script: Path, *arguments: str) -> list[tuple[int, str]]:
    """What so many ``torchrun`` of two processes each return and say, that meet at a port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(count), *meet]
    command += ["--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [*command, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **hidden},
            start_new_session=True,
        )
        for _ in range(count)
    ]
    try:
        said = [machine.communicate(timeout=LIMIT)[0] for machine in started]
    finally:
        for machine in started:
            with suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()
    return [(machine.returncode, text) for machine, text in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of trainings: without checkpoints; one that loses a process in its sixth step; one that fewer go on with."""
    made = tmp_path_factory.mktemp("machines")
    script = made / "rank.py"
    script.write_text(RANK.format(examples=str(EXAMPLES), root=str(ROOT), kill=int(signal.SIGKILL)))
    ended = machines(2, script, str(made), "machine", "all", "lost")
    assert all(code != 0 for code, _ in ended), ended  # none waits for the process that is gone
    whole = sorted(index.parent.name for index in (made / "lost").glob("*/.metadata"))
    assert whole == ["step-000002", "step-000004"], ended
    shutil.copytree(made / "lost", made / "fewer")
    for count, name in ((2, "lost"), (1, "fewer")):
        ended = machines(count, script, str(made), name)
        assert not any(code for code, _ in ended), ended
    return made


@pytest.fixture
def alone(monkeypatch):
    """Parameters after a training of one process on whole batches."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    model = vit()
    plain(model, DataLoader(data(64), batch_size=8), clip=1.0)
    start = dict(vit().named_parameters())
    assert any((p - start[n]).abs().max() > 1e-3 for n, p in model.named_parameters())
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "steps", "shape"), [("machine", 8, [2, 2]), ("all", 8, [4]), ("fewer", 4, [1, 2])]
)
def test_machines_equal_one_process(name, steps, shape, folder, alone):
    found, taken, mesh = torch.load(folder / f"{name}.pt")
    assert (taken, mesh) == (steps, shape)
    torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)


def test_a_training_that_lost_a_process_goes_on_unbroken(folder):
    found, taken, _ = torch.load(folder / "lost.pt")
    assert taken == 4  # from the checkpoint of the fourth step on
    torch.testing.assert_close(found, torch.load(folder / "machine.pt")[0], rtol=0, atol=0)


def test_the_page_has_the_commands():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    own, run = re.findall(r"^torchrun --nnodes 2 (?:.*\\\n)*.*$", page, re.MULTILINE)
    for option in ("--nproc-per-node", "--rdzv-backend c10d", "--rdzv-endpoint", "--rdzv-id"):
        assert option in own
        assert option in run
    assert "examples/torchrun_multinode.py --checkpoints" in own
    assert "--no-python diversevit run" in run
