"""Values of a GPU's steps are read one step late, in order, and all of them."""

import pytest
import torch

from diversevit_fast.experiment import late


class Event:
    def __init__(self, log, number):
        self.log, self.number = log, number

    def query(self):
        return self.number % 2 == 0

    def synchronize(self):
        self.log.append(f"wait {self.number}")


def steps(log, count):
    for number in range(count):
        log.append(f"start {number}")
        yield [torch.tensor(number), torch.tensor([number, number])], f"rest {number}"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_step_in_order(apart, count, monkeypatch):
    log, events = [], iter(range(count))
    if apart:
        monkeypatch.setattr(late, "_APART", ("cpu",))
        monkeypatch.setattr(late, "_now", lambda device: Event(log, next(events)))
    for (number, pair), rest in late.read_late(steps(log, count)):
        assert pair.tolist() == [number.item()] * 2
        assert rest == f"rest {number.item()}"
        log.append(f"read {number.item()}")
    started = [f"start {i}" for i in range(count)]
    if not apart:
        assert log == [x for i in range(count) for x in (f"start {i}", f"read {i}")]
        return
    assert [x for x in log if x.startswith("start")] == started
    assert [x for x in log if x.startswith("read")] == [f"read {i}" for i in range(count)]
    for i in range(count):
        following = min(i + 1, count - 1)
        assert log.index(f"read {i}") > log.index(f"start {following}")
        assert (f"wait {i}" in log) == (i % 2 == 1)


def test_a_cpu_gets_the_tensor_itself():
    x = torch.zeros(3)
    assert late.to_device(x, torch.device("cpu")) is x
