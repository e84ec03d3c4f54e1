"""A training on a GPU waits for it at the end of an epoch, not in its steps; counted on one that computes nothing."""

import pytest

from tests.helpers.fake_gpu import json_from_fake_gpu

pytest.importorskip("sklearn")

EPOCH = """
import json, sys
import torch
from benchmarks.fake_gpu.counters import counts
from diversevit_fast.data import load_splits
from diversevit_fast.experiment import resolve
import diversevit_fast.experiment.train
from diversevit_fast.experiment.checkpoint import State, Task
from diversevit_fast.experiment.distributed import OneProcess

train = sys.modules["diversevit_fast.experiment.train"]
MODEL = {"patch_size": 16, "dim": 16, "depth": 2, "num_heads": 3, "head_dim": 8, "mlp_dim": 16}

class Steps:
    seen = []
    def stepped(self, task, loss, penalty):
        self.seen.append((counts(), loss, penalty))

def epoch(method, **options):
    settings = resolve({"samples": 80, "batch_size": 8, "threads": 1, "model": MODEL, **options})
    dataset, ranks = load_splits("digits-photos", samples=80)["train"], OneProcess(torch.device("cuda"))
    task = Task(method, 0)
    state = State.fresh(settings, task, dataset, ranks.device)
    regulariser = train.Regulariser.of(settings, state.trained)
    step = train.stepper(settings, task, state, regulariser, ranks)
    Steps.seen.clear()
    for _ in range(2):
        row = train._train_epoch(settings, task, state, regulariser, dataset, Steps(), ranks, step)
    return settings, task, state
"""


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    "options", ["'erm'", "'diversevit'", "'diversevit', layers='all', every=2"]
)
def test_no_step_waits(options, graph):
    code = f"""{EPOCH}
epoch({options}, graph={graph})
waits = [seen["waits"] for seen, *_ in Steps.seen]
print(json.dumps([waits, [seen[1:] for seen in Steps.seen]]))
"""
    waits, values = json_from_fake_gpu(code)
    assert len(waits) == 20
    second = waits[10:]
    assert second[-1] == second[0]
    assert all(isinstance(value, float) for value, _ in values)
    assert (values[0][1] is None) == (options == "'erm'")


def test_steps_are_replayed_and_a_training_may_be_resumed_with_and_without_graphs(tmp_path):
    code = f"""{EPOCH}
from pathlib import Path
State.accept = lambda *_: None  # what the rows say is not looked at
result = []
for graph in (True, False):
    settings, task, state = epoch("diversevit", every=2, graph=graph)
    totals = [seen["replays"] for seen, *_ in Steps.seen[10:]]
    replays = [b - a for a, b in zip(totals[:-1], totals[1:-1])]  # each is seen one step late
    state.epoch = 1
    path = Path({str(tmp_path)!r}) / f"{{graph}}.pt"
    state.save(settings, task, path)
    options = state.optimizer.param_groups[0]
    result.append([replays, options["lr"], options["capturable"]])
    other = resolve({{"samples": 80, "batch_size": 8, "threads": 1, "model": MODEL, "every": 2, "graph": not graph}})
    dataset, ranks = load_splits("digits-photos", samples=80)["train"], OneProcess(torch.device("cuda"))
    again = State.fresh(other, task, dataset, ranks.device)
    again.restore(other, task, path)
    regulariser = train.Regulariser.of(other, again.trained)
    step = train.stepper(other, task, again, regulariser, ranks)
    before = counts()["replays"]
    train._train_epoch(other, task, again, regulariser, dataset, Steps(), ranks, step)
    result[-1].append(counts()["replays"] - before)
print(json.dumps(result))
"""
    with_graphs, without = json_from_fake_gpu(code)
    assert with_graphs[0] == [1] * 8
    assert without[0] == [0] * 8
    assert with_graphs[1:3] == without[1:3]
    assert with_graphs[3] == 0
    assert without[3] == 10
