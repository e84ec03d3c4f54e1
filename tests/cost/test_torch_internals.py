"""The private parts of PyTorch that ``cost`` needs still mean what is said of them."""

from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from diversevit_fast.cost import torch_internals as internals


def test_operators():
    add, add_ = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
    assert internals.overload_name(add) == "add"
    assert [internals.argument_is_written(x) for x in (add, add_)] == [False, True]
    assert internals.is_composite(torch.ops.aten.linear.default)
    assert not internals.is_composite(add)
    assert internals.read_value(torch.tensor(3.0)) == 3


def test_fake_tensors_on_a_gpu_that_is_not_there():
    with internals.FakeTensorMode(allow_non_fake_inputs=False), internals.fake_gpu_tensors():
        x = torch.empty(2, device="cpu")
        assert internals.device_of_fake(x).type == "cpu"
        assert x.is_cpu
        assert not x.is_cuda
        with pytest.raises(RuntimeError) as failure:
            bool(x.sum() > 0)
    assert internals.is_fake_failure(failure.value)
    assert not internals.is_fake_failure(ValueError("of mine"))


def test_where_autocast_is_off():
    assert internals.inside_autocast("cpu")
    with torch.autocast("cpu"):
        assert not internals.inside_autocast("cpu")


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def computed_again(around):
    """How often a mode sees a function that a checkpoint runs twice."""
    x, seen = torch.ones(2, requires_grad=True), Seen()
    with seen, around(seen):
        checkpoint(torch.exp, x, use_reentrant=False).sum().backward()
    return seen.names.count("exp")


def test_modes_see_what_a_backward_pass_computes_again():
    engine = torch.autograd._engine_run_backward
    assert computed_again(lambda seen: nullcontext()) == 1
    assert computed_again(lambda seen: internals.around_backward(lambda: seen)) == 2
    assert torch.autograd._engine_run_backward is engine
