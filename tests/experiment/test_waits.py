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
    Steps.seen.clear()
    for _ in range(2):
        row = train._train_epoch(settings, task, state, regulariser, dataset, Steps(), ranks)
    return row
"""


@pytest.mark.parametrize(
    "options", ["'erm'", "'diversevit'", "'diversevit', layers='all', every=2"]
)
def test_no_step_waits(options):
    code = f"""{EPOCH}
epoch({options})
waits = [seen["waits"] for seen, *_ in Steps.seen]
print(json.dumps([waits, [seen[1:] for seen in Steps.seen]]))
"""
    waits, values = json_from_fake_gpu(code)
    assert len(waits) == 20
    second = waits[10:]
    assert second[-1] == second[0]
    assert all(isinstance(value, float) for value, _ in values)
    assert (values[0][1] is None) == (options == "'erm'")
