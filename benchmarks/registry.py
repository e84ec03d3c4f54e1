"""Who computes each stage: ours, and everybody else whom the machine has.

A provider is a function of the stage's inputs, or of a whole workload (the compiled ones). Those that have no
second derivative are labelled so and get no row in d0+d1+d2.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import diversevit_fast as dvf
from diversevit_fast.ops import reference

ORDERS = ("d0", "d0+d1", "d0+d1+d2")
Job = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Provider:
    """One way to compute a stage."""

    name: str
    function: Callable[..., Tensor]
    first_order_only: bool = False
    compiled: bool = False  # one graph made of ``function`` by torch.func and torch.compile
    missing: Callable[[Tensor], str | None] = lambda like: None  # why it cannot run on such tensors

    @property
    def label(self) -> str:
        return f"{self.name} (first order only)" if self.first_order_only else self.name

    def serves(self, order: str) -> bool:
        if self.compiled:  # its point is the second order, and compiling takes long
            return order == "d0+d1+d2"
        return not (self.first_order_only and order == "d0+d1+d2")


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        return F.scaled_dot_product_attention(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return memory_efficient_attention(q, k, v).transpose(1, 2)


def _liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import (  # pyright: ignore[reportMissingImports]
        LigerLayerNormFunction,
    )

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)  # pyright: ignore[reportReturnType]


def _gpu_package(name: str) -> Callable[[Tensor], str | None]:
    def missing(like: Tensor) -> str | None:
        if find_spec(name) is None:
            return f"{name} is not installed"
        return None if like.is_cuda else f"{name} needs a GPU"

    return missing


def _no_compiler(like: Tensor) -> str | None:
    compiler = os.environ.get("CXX", "g++")
    if not like.is_cuda and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler; there is no {compiler}"
    return None


def _eager_penalty(grads: Tensor) -> Tensor:
    return reference.head_penalty(grads)[0]


def _eager_routed(grad_qkv: Tensor, weight: Tensor) -> Tensor:
    return reference.routed_head_penalty(grad_qkv, weight)[0]


def _eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _compiled(eager: Callable[..., Tensor]) -> Provider:
    return Provider("compiled torch.func", eager, compiled=True, missing=_no_compiler)


PROVIDERS: dict[str, list[Provider]] = {
    "attention": [
        Provider("ours", dvf.attention),
        Provider("eager", eager_attention),
        Provider("SDPA math", _math),
        Provider("SDPA fused", _fused, first_order_only=True),
        Provider("xformers", _xformers, first_order_only=True, missing=_gpu_package("xformers")),
        _compiled(eager_attention),
    ],
    "layer_norm": [
        Provider("ours", lambda x, w, b: dvf.layer_norm(x, w.shape, w, b)),
        Provider("eager", _eager_layer_norm),
        Provider("Liger", _liger, first_order_only=True, missing=_gpu_package("liger_kernel")),
        _compiled(_eager_layer_norm),
    ],
    "gelu": [Provider("ours", dvf.gelu), Provider("eager", F.gelu), _compiled(F.gelu)],
    "head_penalty": [
        Provider("ours", lambda grads: _scalar(dvf.head_penalty(grads))),
        Provider("eager", _eager_penalty),
        _compiled(_eager_penalty),
    ],
    "routed_head_penalty": [
        Provider("ours", lambda r, w: _scalar(dvf.routed_head_penalty(r, w))),
        Provider("eager", _eager_routed),
        _compiled(_eager_routed),
    ],
}
"""The second of each stage, eager, is also the formula that judges all, in float64."""


def _scalar(penalty: Any) -> Tensor:
    assert isinstance(penalty, Tensor)
    return penalty


def eager_of(stage: str) -> Callable[..., Tensor]:
    return next(p.function for p in PROVIDERS[stage] if p.name == "eager")
