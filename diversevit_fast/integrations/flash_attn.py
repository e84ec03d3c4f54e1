"""flash-attn's functions, differentiable twice; flash-attn itself is not needed.

>>> from diversevit_fast.integrations.flash_attn import flash_attn_func
>>> out = flash_attn_func(q, k, v, causal=True)

Layouts, arguments and defaults are those of flash-attn 2. Causal masks and windows are aligned at the last query
and the last key, as there. The functions for packed sequences (``varlen``) are here as well.
"""

from torch import Tensor

from ..ops import attention, attention_qkvpacked
from ..ops.attention_qkvpacked import split_qkv
from .flash_attn_options import Window, attention_mask, refuse
from .flash_attn_varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """``flash_attn.flash_attn_func``, twice differentiable.

    Args:
        q: ``[B, Nq, H, d]``.
        k: ``[B, Nk, Hk, d]``, where Hk divides H.
        v: ``[B, Nk, Hk, dv]``.
        dropout_p: probability that an attention weight is set to zero; pass 0 in evaluation.
        softmax_scale: of the scores; ``d ** -0.5`` if None.
        causal: query i attends to the keys up to ``i + Nk - Nq``.
        window_size: (left, right): how many keys before and after its own one a query attends to; -1: all.
        softcap: must be 0.
        alibi_slopes: ``[H]`` or ``[B, H]``: minus the slope times the distance to a key is added to the
            scores. It takes memory of their size, and its slopes get no gradient, as in flash-attn.
        deterministic: results are deterministic either way.
        return_attn_probs: must be False.

    Returns:
        ``[B, Nq, H, dv]``; zeros in rows that attend to nothing.

    Raises:
        UsageError: shapes or dtypes that ``dvf.attention`` refuses; slopes of another shape.
        UnsupportedError: ``softcap``, ``return_attn_probs``; a third derivative.
    """
    refuse(softcap, return_attn_probs)
    mask, is_causal = attention_mask(q, k.shape[1], causal, window_size, alibi_slopes)
    options = (mask, dropout_p, is_causal, softmax_scale, q.shape[2] != k.shape[2])
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *options).transpose(
        1, 2
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """``flash_attn.flash_attn_kvpacked_func``, twice differentiable.

    Args:
        q: ``[B, Nq, H, d]``.
        kv: ``[B, Nk, 2, Hk, d]``. The other arguments are those of ``flash_attn_func``.

    Returns:
        ``[B, Nq, H, d]``.

    Raises:
        UsageError, UnsupportedError: as ``flash_attn_func``.
    """
    k, v = kv.unbind(2)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return flash_attn_func(q, k, v, *rest, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """``flash_attn.flash_attn_qkvpacked_func``, twice differentiable; gradients are written to one tensor.

    Args:
        qkv: ``[B, N, 3, H, d]``. The other arguments are those of ``flash_attn_func``.

    Returns:
        ``[B, N, H, d]``.

    Raises:
        UsageError, UnsupportedError: as ``flash_attn_func``.
    """
    refuse(softcap, return_attn_probs)
    mask, is_causal = attention_mask(qkv[:, :, 0], qkv.shape[1], causal, window_size, alibi_slopes)
    if mask is None:
        options = {"is_causal": is_causal, "scale": softmax_scale, "dropout_p": dropout_p}
        return attention_qkvpacked(qkv, **options)
    q, k, v = split_qkv(qkv)
    return attention(q, k, v, mask, dropout_p, is_causal, softmax_scale).transpose(1, 2)
