"""What is called in Python on fake tensors of a GPU: PyTorch's attention is the fused kernel that would be chosen.

``F.scaled_dot_product_attention`` asks the driver which of its kernels can run. Here the choice is that of a GPU of
compute capability 8.0 or more: flash attention in half types, the memory-efficient kernel in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .fake import Disguise
from .torch_internals import efficient_attention, flash_attention

_WIDEST = 256  # head width of flash attention


class FakeGpuCalls(TorchFunctionMode):
    """Inside, ``F.scaled_dot_product_attention`` of fake tensors on a GPU is one of PyTorch's fused kernels.

    And ``disguise`` knows whether autocast is on: inside an operator C++ switches it off.
    """

    def __init__(self, disguise: Disguise):
        super().__init__()
        self._disguise = disguise

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self._disguise.autocast = torch.is_autocast_enabled("cuda")
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is Tensor.requires_grad_ and result.requires_grad and result.is_leaf:
            self._disguise.leaf(result)
        return result


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        narrow = torch.get_autocast_dtype("cuda")
        q, k, v = (x.to(narrow) for x in (q, k, v))
    options: Any = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    if attn_mask is None and q.dtype != torch.float32 and q.shape[-1] <= _WIDEST:
        return flash_attention(q, k, v, **options)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return efficient_attention(q, k, v, attn_mask, True, **options)[0]
