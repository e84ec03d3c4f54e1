"""The work of an operator's call, from the backend that would run it: FLOPs, launches, scratch memory.

Importing this module also teaches ``torch.utils.flop_counter`` the operators' products, so that PyTorch's
``FlopCounterMode`` sees them.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from diversevit_kernels.common.contracts import (
    AttentionBackward,
    AttentionDoubleBackward,
    GeluBackward,
    GeluDoubleBackward,
    HeadPenaltyBackward,
    HeadPenaltyDoubleBackward,
    LayerNormBackward,
    LayerNormDoubleBackward,
    RoutedHeadPenaltyBackward,
    RoutedHeadPenaltyDoubleBackward,
)
from diversevit_kernels.common.torch_internals import without_modes
from diversevit_kernels.common.work import Work

from .._torch_internals import name_of, overload_of, tree_flatten, tree_unflatten
from ..errors import UnsupportedError
from .attention import (
    attention_backward_operator,
    attention_double_backward_operator,
    attention_operator,
)
from .attention_qkvpacked import (
    attention_qkvpacked_backward_operator,
    attention_qkvpacked_double_backward_operator,
    attention_qkvpacked_operator,
    split_qkv,
)
from .backends import folder_of
from .head_penalty import (
    head_penalty_backward_operator,
    head_penalty_double_backward_operator,
    head_penalty_operator,
)
from .routed_head_penalty import (
    routed_head_penalty_backward_operator,
    routed_head_penalty_double_backward_operator,
    routed_head_penalty_operator,
)

PRODUCTS = (
    attention_operator,
    attention_backward_operator,
    attention_double_backward_operator,
    attention_qkvpacked_operator,
    attention_qkvpacked_backward_operator,
    attention_qkvpacked_double_backward_operator,
    head_penalty_operator,
    head_penalty_backward_operator,
    head_penalty_double_backward_operator,
    routed_head_penalty_operator,
    routed_head_penalty_backward_operator,
    routed_head_penalty_double_backward_operator,
)
"""The operators with matrix products."""

_TAKES: dict[str, Any] = {
    "attention_backward": AttentionBackward,
    "attention_double_backward": AttentionDoubleBackward,
    "layer_norm_backward": LayerNormBackward,
    "layer_norm_double_backward": LayerNormDoubleBackward,
    "gelu_backward": GeluBackward,
    "gelu_double_backward": GeluDoubleBackward,
    "head_penalty_backward": HeadPenaltyBackward,
    "head_penalty_double_backward": HeadPenaltyDoubleBackward,
    "routed_head_penalty_backward": RoutedHeadPenaltyBackward,
    "routed_head_penalty_double_backward": RoutedHeadPenaltyDoubleBackward,
}
"""Function of a backend -> the named tuple that it takes; those that are not here take the operator's arguments."""

_found: dict[Any, Work] = {}
_MOST = 4096  # calls that are remembered


def work_of(name: str, args: tuple[Any, ...], architecture: str | None = None) -> Work:
    """The work of a call of ``diversevit::<name>`` on tensors, with or without memory.

    Args:
        args: the operator's, as a dispatch mode sees them.
        architecture: of the GPU that it is counted for, as Triton names it (``"sm_90"``); None counts for a CPU.

    Raises:
        UnsupportedError: Triton is missing, or its kernels do not take the tensors.
    """
    leaves, layout = tree_flatten(args)
    precision = torch.get_float32_matmul_precision()
    key = name, architecture, precision, layout, *map(_kind, leaves)
    if key not in _found:
        if len(_found) >= _MOST:
            _found.clear()
        with without_modes(), torch.no_grad():
            made = tree_unflatten([_without_memory(x) for x in leaves], layout)
            _found[key] = _work_of(name, made, architecture)
    return _found[key]


def _work_of(name: str, args: Any, architecture: str | None) -> Work:
    function, operands = _call_of(name, args)
    folder = folder_of(function)
    on_cpu = getattr(import_module(f"diversevit_kernels.cpu.{folder}.work"), function)(*operands)
    if architecture is None:
        return on_cpu
    if find_spec("triton") is None:
        raise UnsupportedError(
            "device: the kernels of a GPU are counted by Triton's launches, and Triton is not installed; "
            "count for a CPU, or pip install triton"
        )
    counted = import_module("diversevit_kernels.triton.runtime.counted")
    kernels = import_module(f"diversevit_kernels.triton.{folder}")
    products = import_module(f"diversevit_kernels.triton.{folder}.work").PRODUCTS
    run = getattr(kernels, function)
    try:
        return counted.work_of(run, operands, products, architecture, on_cpu.elementwise)
    except NotImplementedError as refusal:
        raise UnsupportedError(f"{refusal}; no GPU kernel runs this") from None


def _kind(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _without_memory(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def is_operator(func: Any) -> bool:
    """Whether what a dispatch mode sees is an operator of this library."""
    return func.namespace == "diversevit"


def order_of(name: str) -> str:
    """``"forward"``, ``"backward"`` or ``"double backward"`` of an operator's name."""
    for ending in ("_double_backward", "_backward"):
        if name.endswith(ending):
            return ending[1:].replace("_", " ")
    return "forward"


def _call_of(name: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """The function of a backend that the operator calls, and its operands."""
    if name.startswith("attention_qkvpacked"):
        return _of_packed(name.replace("_qkvpacked", ""), *args)
    if taken := _TAKES.get(name):
        return name, (taken(*args),)
    return f"{name}_forward", args


def _of_packed(name: str, qkv: Tensor, seed: Tensor | None, *rest: Any) -> tuple[str, Any]:
    if name == "attention":
        *options, queries = (*rest, None) if len(rest) == 3 else rest
        return "attention_forward", (*split_qkv(qkv, queries), None, seed, *options)
    o, softmax, do, *more = rest
    saved = (*split_qkv(qkv, do.shape[1]), None, seed, o.transpose(1, 2), softmax)
    saved = (*saved, do.transpose(1, 2))
    if name == "attention_backward":
        return name, (AttentionBackward(*saved, *more, mask_grad=False),)
    dqkv, ddqkv, *options = more
    dq = None if dqkv is None else split_qkv(dqkv, do.shape[1])[0]
    cotangents = (*split_qkv(ddqkv, do.shape[1]), None)
    return name, (AttentionDoubleBackward(*saved, dq, *cotangents, *options, mask_grad=False),)


def _register() -> None:
    """Give PyTorch's flop counter a formula for each operator with products."""
    for one in PRODUCTS:
        name = name_of(one)

        def formula(*args: Any, out_val: Any = None, _name: str = name, **_: Any) -> int:
            return work_of(_name, args).products

        register_flop_formula(overload_of(one).overloadpacket, get_raw=True)(formula)


_register()
