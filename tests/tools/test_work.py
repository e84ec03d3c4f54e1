"""The products and launches that are counted from shapes are those that Triton's interpreter executes."""

import importlib
import inspect
import os

import pytest
import torch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter"
)
pytest.importorskip("triton")

from diversevit_kernels.triton.runtime import counted, device  # noqa: E402
from tools.interpreter.traffic import counting  # noqa: E402
from tools.kernel_analysis.operators import OPERATORS, folder, run_orders  # noqa: E402


def without_memory(x):
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def work_of(name, order, given, architecture):
    """The work of the order whose function is called with ``given``."""
    module = importlib.import_module(f"diversevit_kernels.triton.{folder(name)}")
    products = importlib.import_module(f"{module.__name__}.work").PRODUCTS
    function = getattr(module, f"{name}_{order}")
    arguments = {k: without_memory(x) for k, x in given.items()}
    inputs = next(iter(inspect.signature(function).parameters.values())).annotation
    if isinstance(inputs, type) and issubclass(inputs, tuple):
        arguments = {"inputs": inputs(**arguments)}
    return counted.work_of(function, tuple(arguments.values()), products, architecture)


CASES = [
    ("attention", 9, "sm_90"),  # few queries
    ("attention", 40, "sm_90"),  # rows and columns
    ("attention", 40, "sm_80"),
    ("head_penalty", 2, "sm_90"),
]


@pytest.mark.parametrize(("name", "tokens", "architecture"), CASES)
def test_what_is_executed(name, tokens, architecture):
    values = OPERATORS[name].values(tokens, torch.bfloat16)

    def around(order, run):
        with counting() as launches:
            results = run()
        _, given = run.__defaults__
        work = work_of(name, order, given, architecture)
        assert work.products == sum(one.dot_flops for one in launches), order
        assert work.launches == len(launches), order
        return results

    with device.pretend(architecture):
        run_orders(name, values, around)


def test_causal_walks():
    values = {**OPERATORS["attention"].values(80, torch.bfloat16), "is_causal": True}

    def around(order, run):
        with counting() as launches:
            results = run()
        _, given = run.__defaults__
        work = work_of("attention", order, given, "sm_90")
        assert work.products == sum(one.dot_flops for one in launches), order
        return results

    with device.pretend("sm_90"):
        run_orders("attention", values, around)


@pytest.mark.parametrize("granularity", ["token", "sample"])
def test_routed_penalty(granularity):
    from diversevit_kernels.triton import head_penalty

    r, w = torch.randn(1, 3, 3, 2, 16), torch.randn(3, 2, 16, 32)
    kind = {"granularity": granularity, "reduction": "all", "eps": 1e-12}
    given = {"grad_qkv": r, "weight": w, **kind}
    with device.pretend("sm_90"):
        with counting() as launches:
            value, cosines, norms = head_penalty.routed_head_penalty_forward(**given)
        work = work_of("routed_head_penalty", "forward", given, "sm_90")
        assert work.products == sum(one.dot_flops for one in launches)
        assert work.launches == len(launches)
        given |= {"cosines": cosines, "norms": norms, "dcosines": None}
        given["dpenalty"] = torch.ones_like(value)
        inputs = head_penalty.routed.RoutedHeadPenaltyBackward(**given)
        with counting() as launches:
            head_penalty.routed_head_penalty_backward(inputs)
        work = work_of("routed_head_penalty", "backward", given, "sm_90")
        assert work.products == sum(one.dot_flops for one in launches)
        assert work.launches == len(launches)
