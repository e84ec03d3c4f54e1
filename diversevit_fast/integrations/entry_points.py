"""The functions of attention libraries, run by ours inside blocks of ``dvf.second_order``.

A function that a model imported by name cannot be put in another's place, so what it calls is: xformers' private
function behind ``memory_efficient_attention``, and the ``autograd.Function`` behind each function of flash-attn.
"""

from collections.abc import Callable
from inspect import signature
from types import ModuleType
from typing import Any

from torch import Tensor

from ..attachment.second_order import inside_blocks
from ..errors import UnsupportedError


def watch_xformers(module: ModuleType) -> None:
    """Watch ``xformers.ops.fmha``."""

    def attend(inputs: Any, op: Any = None) -> Tensor:
        from .xformers import memory_efficient_attention

        return memory_efficient_attention(
            *(inputs.query, inputs.key, inputs.value, inputs.attn_bias, inputs.p, inputs.scale),
            output_dtype=inputs.output_dtype,
        )

    original = module._memory_efficient_attention
    module._memory_efficient_attention = inside_blocks(attend, original)  # pyright: ignore


def watch_flash_attn(module: ModuleType) -> None:
    """Watch ``flash_attn.flash_attn_interface`` of flash-attn 2, or ``flash_attn_interface`` of flash-attn 3."""
    from . import flash_attn as ours

    known = {
        "FlashAttnFunc": ours.flash_attn_func,
        "FlashAttnKVPackedFunc": ours.flash_attn_kvpacked_func,
        "FlashAttnQKVPackedFunc": ours.flash_attn_qkvpacked_func,
        "FlashAttnVarlenFunc": ours.flash_attn_varlen_func,
        "FlashAttnVarlenKVPackedFunc": ours.flash_attn_varlen_kvpacked_func,
        "FlashAttnVarlenQKVPackedFunc": ours.flash_attn_varlen_qkvpacked_func,
    }
    for name, function in list(vars(module).items()):
        if not (isinstance(function, type) and name.startswith("FlashAttn")):
            continue
        replacement = None if module.__name__ == "flash_attn_interface" else known.get(name)
        names = list(signature(function.forward).parameters)[1:]
        call = _refuse(module, name) if replacement is None else _by_name(replacement, names)
        function.apply = staticmethod(inside_blocks(call, function.apply))


def _by_name(function: Callable[..., Tensor], names: list[str]) -> Callable[..., Tensor]:
    """``function``, called with the arguments of an ``autograd.Function`` that has these names for them."""

    def call(*args: Any) -> Tensor:
        named = dict(zip(names, args, strict=False))
        named.pop("is_grad_enabled", None)
        named["return_attn_probs"] = named.pop("return_softmax", False)
        return function(**named)

    return call


def _refuse(module: ModuleType, name: str) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        raise UnsupportedError(
            f"second_order: {name} of {module.__name__} has no second derivative; call "
            "F.scaled_dot_product_attention, or a function of diversevit_fast.integrations.flash_attn"
        )

    return call
