"""What the eager path of ``diversevit_fast.ops.autograd`` saves: host time of tiny operators with and without it.

    python -m benchmarks.scripts.dispatch

On tensors of a few elements the time is that of Python and the dispatcher. For each operator: microseconds of forward,
backward and double backward together, as users get it, and through the ``torch.library`` operator; least thread time of
several interleaved runs on one thread.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import diversevit_fast as dvf
from diversevit_fast.ops import autograd

CALLS, ROUNDS = 20, 200


def to_second_order(f: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    """One forward, backward and double backward of ``f``."""
    leaves = [x.requires_grad_() for x in inputs]
    do = torch.ones_like(f(*leaves))
    cotangents = [torch.ones_like(x) for x in leaves]

    def run() -> Any:
        first = torch.autograd.grad(f(*leaves), leaves, do, create_graph=True)
        return torch.autograd.grad(first, leaves, cotangents, allow_unused=True)

    return run


def operators() -> dict[str, Callable[[], Any]]:
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    x, w, b = torch.randn(4, 16), torch.ones(16), torch.zeros(16)
    return {
        "attention": to_second_order(dvf.attention, q, k, v),
        "attention_qkvpacked": to_second_order(dvf.attention_qkvpacked, torch.randn(1, 4, 3, 2, 8)),
        "layer_norm": to_second_order(lambda *y: dvf.layer_norm(y[0], 16, *y[1:]), x, w, b),
        "gelu": to_second_order(dvf.gelu, torch.randn(4, 16)),
    }


def microseconds(run: Callable[[], Any]) -> float:
    start = time.thread_time_ns()
    for _ in range(CALLS):
        run()
    return (time.thread_time_ns() - start) / CALLS / 1e3


def main() -> None:
    torch.set_num_threads(1)
    for name, run in operators().items():
        least = [float("inf")] * 2
        for _ in range(ROUNDS):
            for i in range(2):
                watched = mock.patch.object(autograd, "_watched", return_value=True)
                with watched if i else nullcontext():
                    least[i] = min(least[i], microseconds(run))
        print(f"{name:20} {least[0]:6.0f} us   through the dispatcher {least[1]:6.0f} us")


if __name__ == "__main__":
    main()
