"""On a GPU no step of the penalty waits for it; counted on the GPU that computes nothing."""

import pytest
import torch

from tests.helpers.fake_gpu import json_from_fake_gpu, run_on_fake_gpu

STEP = """
import contextlib, json, math, torch
from torch.nn import functional as F
from benchmarks.fake_gpu.counters import counting
import diversevit_fast as dvf
from diversevit_fast.models import DiverseViT

model = DiverseViT(image_size=(32, 32), patch_size=8, dim=24, depth=3, num_heads=3, head_dim=8, mlp_dim=24).cuda()
images = torch.rand(6, 3, 32, 32, device="cuda")
labels = torch.zeros(6, dtype=torch.int64, device="cuda")

def stepping(half=False, **options):
    diversity = dvf.HeadDiversity(model, **options)
    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            with diversity:
                logits = model(images)
            loss = F.cross_entropy(logits, labels) + diversity.penalty(logits)
        loss.backward()
    return diversity, step

def counted(job, warm=3):
    for _ in range(warm):
        job()
    with counting() as found:
        job()
    return found
"""

OPTIONS = {
    "last": "{}",
    "all": "{'layers': 'all'}",
    "output": "{'wrt': 'output', 'reduction': 'pairs', 'granularity': 'sample'}",
    "probability": "{'target': 'probability', 'grad_scale': 8.0}",
    "every": "{'every': 3}",
    "fraction": "{'fraction': 0.5, 'layers': 'all'}",
    "fraction, cpu": "{'fraction': 0.5, 'generator': torch.Generator()}",
    "bfloat16": "{'half': True, 'layers': 'all'}",
    "unchecked": "{'check_finite': False}",
}


def test_no_step_waits():
    code = f"""{STEP}
found = {{}}
for name, options in {OPTIONS!r}.items():
    _, step = stepping(**eval(options))
    found[name] = counted(step)
print(json.dumps(found))
"""
    found = json_from_fake_gpu(code)
    assert {name: one["waits"] for name, one in found.items()} == dict.fromkeys(OPTIONS, 0)
    launched = {name: one["triton"] + one["kernels"] for name, one in found.items()}
    # looking for NaN: the largest magnitude, the larger of it and what was seen, and a copy
    assert launched["last"] - launched["unchecked"] == 2
    assert found["last"]["copies"] - found["unchecked"]["copies"] == 1


def test_samples_drawn_by_the_cpu():
    """They reach the GPU, drawn by the generator as on a CPU."""
    code = f"""{STEP}
generator = torch.Generator().manual_seed(5)
diversity, step = stepping(fraction=0.5, generator=generator)
drawn = []
for _ in range(3):
    step()
    drawn.append(diversity.samples.tolist())
print(json.dumps([drawn, generator.get_state().tolist()]))
"""
    drawn, state = json_from_fake_gpu(code, copies=True)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(2 * len(samples), generator=generator).tolist() for samples in drawn]
    assert [order[: len(order) // 2] for order in orders] == drawn
    assert state == generator.get_state().tolist()


def test_only_who_asks_waits():
    code = f"""{STEP}
diversity, step = stepping()
step()
print(json.dumps(counted(diversity.check, warm=0)["waits"]))
"""
    assert json_from_fake_gpu(code) == 1


def test_the_step_after_reports_without_waiting():
    """What the copy to the host brought is read there: here it is written by hand."""
    code = f"""{STEP}
diversity, step = stepping()
step()
(seen,) = diversity._finite._seen.values()
seen.host.fill_(math.inf)
try:
    with diversity:
        pass
except dvf.UsageError as error:
    print(error)
"""
    assert "NaN or infinity in an earlier step" in run_on_fake_gpu(code)


@pytest.mark.parametrize("warm", [True, False])
def test_a_captured_step_keeps_its_flag(warm):
    """Also where nothing ran before the capture, which may not allocate the host's part of it."""
    code = f"""{STEP}
from diversevit_fast.penalty.finite_logits import FiniteLogits
finite, logits = FiniteLogits(), torch.rand(6, 2, device="cuda")
if {warm}:
    finite.note(logits)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph), counting() as captured:
    finite.look()
    finite.note(logits)
with counting() as found:
    graph.replay()
    finite.look()
    finite.note(logits)
finite.wait()
print(json.dumps([found["refused"], found["waits"], captured["copies"]]))
"""
    assert json_from_fake_gpu(code) == [0, 0, int(warm)]
