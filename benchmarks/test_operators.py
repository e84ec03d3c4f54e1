"""``pytest benchmarks/``: each operator to each order, against eager PyTorch, after a correctness gate.

Every row differentiates the same way; ``extra_info`` records shape, dtype, order, provider and machine.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import diversevit_fast as dvf
from benchmarks.timing import conditions

TOKENS = {"vit-s/224": (4, 6, 197, 64)}


def attention_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(TOKENS["vit-s/224"], dtype=dtype).requires_grad_() for _ in range(3)]


def feature_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(8, 197, 384, dtype=dtype).requires_grad_()]


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


STAGES: dict[str, tuple[Callable[..., list[Tensor]], dict[str, Callable[..., Tensor]]]] = {
    "attention": (
        attention_inputs,
        {"ours": dvf.attention, "eager": eager_attention, "sdpa-math": math_attention},
    ),
    "layer_norm": (
        feature_inputs,
        {"ours": lambda x: dvf.layer_norm(x, 384), "eager": lambda x: F.layer_norm(x, (384,))},
    ),
    "gelu": (feature_inputs, {"ours": dvf.gelu, "eager": F.gelu}),
}
ROWS = [(stage, provider) for stage, (_, providers) in STAGES.items() for provider in providers]


def run(f: Callable[..., Tensor], inputs: list[Tensor], order: str) -> Any:
    """d0, d0+d1 or d0+d1+d2 of ``f``: its value, its gradient, the gradient of a function of both."""
    if order == "d0":
        with torch.no_grad():
            return f(*inputs)
    value = f(*inputs).square().sum()
    if order == "d0+d1":
        return torch.autograd.grad(value, inputs)
    inner = torch.autograd.grad(value, inputs, create_graph=True)
    return torch.autograd.grad(torch.stack([g.square().sum() for g in inner]).sum(), inputs)


@pytest.mark.parametrize("order", ["d0", "d0+d1", "d0+d1+d2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("stage", "provider"), ROWS, ids=[f"{s}-{p}" for s, p in ROWS])
def test_operator(benchmark, stage, provider, dtype, order):
    make, providers = STAGES[stage]
    torch.manual_seed(0)
    inputs = make(dtype)
    f = providers[provider]
    gate = [x.detach().float().requires_grad_() for x in inputs]
    exact = run(providers["eager"], gate, order)
    rough = 1e-3 if dtype == torch.float32 else 0.2
    for ours, theirs in zip(
        *((x,) if order == "d0" else x for x in (run(f, inputs, order), exact)), strict=True
    ):
        assert (ours.float() - theirs).norm() <= rough * theirs.norm()
    benchmark.group = f"{stage} {order} {dtype}"
    benchmark.extra_info.update(conditions(), shape=list(inputs[0].shape), provider=provider)
    benchmark.pedantic(run, args=(f, inputs, order), rounds=5, warmup_rounds=1)
