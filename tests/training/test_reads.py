"""What a loss of ``graph_step`` reads besides its batch: numbers by name, tensors that are rebound, a weight."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.training.reads import NamesRead
from tests.helpers.fake_gpu import json_from_fake_gpu
from tests.helpers.stand_in_graphs import stand_in_graphs

strength = 1.0


class Options:
    """An object that a loss finds by name."""

    strength = 0.5

    def __init__(self):
        self.strength = 1.0
        self.calls = 0


def batch(seed):
    return torch.rand(4, 3, generator=torch.Generator().manual_seed(seed)), torch.arange(4) % 2


def closure(model):
    strength = torch.tensor(1.0)

    def loss(x, y):
        return strength * F.cross_entropy(model(x), y)

    def change(to):
        nonlocal strength
        strength = torch.tensor(to)

    return loss, change


def global_name(model):
    def change(to):
        global strength
        strength = to

    return lambda x, y: strength * F.cross_entropy(model(x), y), change


def attribute(model):
    options = Options()

    def loss(x, y):
        options.calls += 1  # which the loss itself changes
        return options.strength * F.cross_entropy(model(x), y)

    return loss, partial(setattr, options, "strength")


def entry(model):
    options = {"strength": 1.0}

    def loss(x, y):
        return sum(options["strength"] * F.cross_entropy(model(x), y) for _ in range(2))

    return loss, partial(options.__setitem__, "strength")


def method(model):
    class Task(Options):
        def loss(self, x, y):
            return self.strength * F.cross_entropy(model(x), y)

    task = Task()
    return task.loss, partial(setattr, task, "strength")


def trained(make):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    loss, change = make(model)
    step = dvf.graph_step(loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for i in range(6):
        if i % 2 == 0:
            change(1.0 + i)
        step(*batch(i))
    return model.weight.detach()


@pytest.mark.parametrize("make", [closure, global_name, attribute, entry, method])
def test_what_a_name_stands_for_changes(make):
    """A rebound tensor, or another number, is another graph; each is captured once."""
    wanted = trained(make)
    with stand_in_graphs() as recorder:
        assert torch.equal(trained(make), wanted)
    assert len(recorder.graphs) == 3


def test_names_are_those_that_the_code_reads():
    """A number of that name somewhere else is none."""
    code = "import json\nother = 1\nread = 2\ndef function(x): return x.other + read + json.dumps"
    namespace = {}
    exec(code, namespace)
    names = NamesRead(namespace["function"])
    assert names.values() == ((int, 2),)
    assert NamesRead(json.dumps.__call__).values() == NamesRead(len).values() == ()


def test_a_weight_that_follows_a_schedule():
    def run(replayed):
        torch.manual_seed(0)
        model, taken = nn.Linear(3, 2), []

        def loss(x, y, weight):
            return weight * F.cross_entropy(model(x), y), weight

        def schedule():
            return 0.5 * len(taken)

        step = dvf.graph_step(loss, torch.optim.SGD(model.parameters(), lr=0.1), weight=schedule)
        for i in range(4):
            taken.append(step(*batch(i))[1])
        assert step.graphs == replayed
        return torch.stack(taken), model.weight.detach()

    plain = run(0)
    assert plain[0].tolist() == [0, 0.5, 1, 1.5]
    with stand_in_graphs():
        assert all(map(torch.equal, run(1), plain))


HOST_NUMBERS = """
import json
import torch, diversevit_fast as dvf
from torch import nn
class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), torch.tensor(1.0)
    def forward(self, x): return self.scale * self.linear(x)
model = Scaled().cuda()
calls = []
def loss(x):
    calls.append(1)
    return model(x).sum()
step = dvf.graph_step(loss, torch.optim.SGD(model.parameters(), lr=0.1))
x, told = torch.rand(4, 3), []
for scale in (1.0, 1.0, 2.0, 2.0, 3.0):
    model.scale.fill_(scale)
    calls.clear()
    step(x)
    told.append(len(calls) > 0)
model.scale = model.scale.cuda()
step(x)
model.scale.fill_(4.0)
calls.clear()
step(x)
print(json.dumps([told, len(calls), model.scale.item()]))
"""


def test_a_number_on_the_host_is_captured_anew():
    """A tensor without axes on the CPU may be multiplied with tensors of the GPU; a graph holds its value."""
    told, after, _ = json_from_fake_gpu(HOST_NUMBERS, copies=True)
    assert told == [True, False, True, False, True]
    assert after == 0  # on the GPU it changes freely
