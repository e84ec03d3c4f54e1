"""A ``.pt2`` file of a model with our operators: what the process that loads it has to import."""

import subprocess
import sys

import pytest
import torch

from diversevit_fast.ops.onnx import DECOMPOSITIONS
from tests.helpers.versions import quiet_export
from tests.helpers.vits import diverse_vit, images_for

LOAD = """
import sys
{first}
import torch
images, expect = torch.load({answers!r})
try:
    ours = torch.export.load({path!r}).module()(images)
except RuntimeError:
    sys.exit("not loaded")
torch.testing.assert_close(ours, expect)
print("equal", "diversevit_fast" in sys.modules)
"""


@pytest.fixture
def program():
    model = diverse_vit(depth=1).eval()
    images = images_for(model)
    return torch.export.export(model, (images,)), images, model(images).detach()


def loaded_elsewhere(tmp_path, program, images, expect, first=""):
    """In another process that begins with ``first``."""
    path, answers = str(tmp_path / "model.pt2"), str(tmp_path / "answers.pt")
    torch.export.save(program, path)
    torch.save((images, expect), answers)
    code = LOAD.format(first=first, path=path, answers=answers)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_after_the_import(tmp_path, program):
    run = loaded_elsewhere(tmp_path, *program, first="import diversevit_fast")
    assert run.stdout == "equal True\n", run.stderr


def test_without_the_import_it_is_asked_for(tmp_path, program):
    """By PyTorch, which names the operator; nothing of ours runs there."""
    run = loaded_elsewhere(tmp_path, *program)
    assert run.returncode == 1
    assert "failed to resolve torch.ops.diversevit." in run.stderr
    assert "import the custom op" in run.stderr


@quiet_export
def test_decomposed_it_needs_none(tmp_path, program):
    exported, images, expect = program
    decomposed = exported.run_decompositions(DECOMPOSITIONS)
    run = loaded_elsewhere(tmp_path, decomposed, images, expect)
    assert run.stdout == "equal False\n", run.stderr
