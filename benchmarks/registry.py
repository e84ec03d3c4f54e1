"""The implementations of each operator that are compared: ours, PyTorch's, and those of other installed packages.

An implementation is a function of the operator's inputs. Those without a double backward are labelled so and get no
row of that order.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import dropwhile, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import diversevit_fast as dvf
from benchmarks.orders import DOUBLE_BWD
from diversevit_fast.ops import reference

Job = Callable[[], tuple[Tensor, ...]]
FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator."""

    name: str
    function: Callable[..., Tensor]
    first_order_only: bool = False
    compiled: bool = False  # one graph made of ``function`` by torch.func and torch.compile
    missing: Callable[[Tensor], str | None] = lambda like: None  # why it cannot run on such tensors

    @property
    def label(self) -> str:
        return f"{self.name} (first order only)" if self.first_order_only else self.name

    def serves(self, order: str) -> bool:
        """Whether it has a row of that order."""
        if self.compiled:  # its point is the second order, and compiling takes long
            return order == DOUBLE_BWD
        return not (self.first_order_only and order == DOUBLE_BWD)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    return scores.softmax(-1) @ v


def _sdpa(*backends: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention by these of its kernels and no other."""

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return attention


def _pinned(name: str, backend: SDPBackend, in_warnings: str) -> Implementation:
    """One of PyTorch's fused kernels, on a GPU; it is left out, with PyTorch's reason, where PyTorch refuses it."""
    attention = _sdpa(backend)

    def missing(like: Tensor) -> str | None:
        if not like.is_cuda:
            return f"{name} needs a GPU"
        x = like.detach()[:1].requires_grad_()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                attention(x, x, x).sum().backward()
            except RuntimeError as refusal:
                said = [str(one.message).partition(" (Triggered")[0] for one in told]
                return f"{name}: {_reason(said, in_warnings) or refusal}"
        return None

    return Implementation(name, attention, first_order_only=True, missing=missing)


def _reason(said: list[str], kernel: str) -> str:
    """What PyTorch's warnings say of one kernel: those that follow its heading, up to the next one's."""
    mine = dropwhile(lambda one: not one.startswith(kernel), said)
    next(mine, None)
    return " ".join(takewhile(lambda one: "not used because" not in one, mine))


def _xformers(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    from xformers.ops import (  # pyright: ignore[reportMissingImports]
        LowerTriangularMask,
        memory_efficient_attention,
    )

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = LowerTriangularMask() if is_causal else None
    return memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)


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


def _compiled(eager: Callable[..., Tensor]) -> Implementation:
    return Implementation("compiled torch.func", eager, compiled=True, missing=_no_compiler)


IMPLEMENTATIONS: dict[str, list[Implementation]] = {
    "attention": [
        Implementation("ours", dvf.attention),
        Implementation("eager", eager_attention),
        Implementation("SDPA math", _sdpa(SDPBackend.MATH)),
        Implementation("SDPA fused", _sdpa(FLASH, EFFICIENT), first_order_only=True),
        _pinned("SDPA flash", FLASH, "Flash"),
        _pinned("SDPA efficient", EFFICIENT, "Memory efficient"),
        _pinned("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, "cuDNN"),
        Implementation(
            "xformers", _xformers, first_order_only=True, missing=_gpu_package("xformers")
        ),
        _compiled(eager_attention),
    ],
    "layer_norm": [
        Implementation("ours", lambda x, w, b: dvf.layer_norm(x, w.shape, w, b)),
        Implementation("eager", _eager_layer_norm),
        Implementation(
            "Liger", _liger, first_order_only=True, missing=_gpu_package("liger_kernel")
        ),
        _compiled(_eager_layer_norm),
    ],
    "gelu": [Implementation("ours", dvf.gelu), Implementation("eager", F.gelu), _compiled(F.gelu)],
    "head_penalty": [
        Implementation("ours", lambda grads: _scalar(dvf.head_penalty(grads))),
        Implementation("eager", _eager_penalty),
        _compiled(_eager_penalty),
    ],
    "routed_head_penalty": [
        Implementation("ours", lambda r, w: _scalar(dvf.routed_head_penalty(r, w))),
        Implementation("eager", _eager_routed),
        _compiled(_eager_routed),
    ],
}
"""Operator -> implementations. Eager's in float64 is the reference of all."""


def _scalar(penalty: Any) -> Tensor:
    assert isinstance(penalty, Tensor)
    return penalty


def named(operator: str, name: str) -> Implementation:
    """Return the implementation of an operator that has that name."""
    return next(one for one in IMPLEMENTATIONS[operator] if one.name == name)


def eager_of(operator: str) -> Callable[..., Tensor]:
    return named(operator, "eager").function
