"""``--graph`` and ``--no-graph``: the same training, here on a CPU, where neither captures anything."""

import sys

import pytest
import torch

from diversevit_fast.data import load_splits
from diversevit_fast.experiment import resolve
from diversevit_fast.experiment.checkpoint import State, Task
from diversevit_fast.experiment.distributed import OneProcess

pytest.importorskip("sklearn")
MODEL = {"patch_size": 16, "dim": 16, "depth": 2, "num_heads": 3, "head_dim": 8, "mlp_dim": 16}


class Silent:
    def stepped(self, *_):
        pass


@pytest.mark.parametrize(
    ("method", "options"),
    [("erm", {}), ("diversevit", {"every": 2, "fraction": 0.5, "layers": "all"})],
)
def test_a_cpu_trains_the_same_either_way(method, options):
    train = sys.modules["diversevit_fast.experiment.train"]
    dataset = load_splits("digits-photos", samples=80)["train"]
    results = []
    for graph in (True, False):
        chosen = {
            "samples": 80,
            "batch_size": 24,
            "threads": 1,
            "workers": 1,
            "model": MODEL,
            "graph": graph,
        }
        settings = resolve({**chosen, **options})
        task, ranks = Task(method, 0), OneProcess(torch.device("cpu"))
        state = State.fresh(settings, task, dataset, ranks.device)
        regulariser = train.Regulariser.of(settings, state.trained)
        step = train.stepper(settings, task, state, regulariser, ranks)
        given = settings, task, state, regulariser, dataset, Silent(), ranks, step
        rows = [train._train_epoch(*given) for _ in range(2)]
        losses = [(row["loss"], row["penalty"]) for row in rows]
        results.append((losses, list(state.model.parameters())))
    (losses, parameters), (plain_losses, plain_parameters) = results
    assert losses == plain_losses
    assert all(map(torch.equal, parameters, plain_parameters))
