"""``F.multi_head_attention_forward`` with replaceable projections and attention.

PyTorch computes all of it in one function, so a function mode sees only the whole. The formulas here are
PyTorch's; the caller passes the functions that compute attention and the projections.
"""

from collections import namedtuple
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedError
from ..ops import attention
from .packed_projection import PackedAttention
from .unfused_attention import Unfused, masked_softmax

Project = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
"""(which of "qkv" it makes, x, weight, bias) -> the linear layer's output."""


def _plain(roles: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def multi_head_attention(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    project: Project = _plain,
    attend: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``F.multi_head_attention_forward(*args, **kwargs)``.

    Where ``query is key is value`` the projection is one product, whose output ``[B, N, 3 H d]`` is what
    ``project`` returns; else there is one for each. ``attend`` is called with the function that has to
    compute attention, or None if any may, followed by the arguments of SDPA, on ``[B, H, N, d]``. Without
    ``attend`` it is ``dvf.attention``, or ``attention_qkvpacked`` of the one product.

    With ``need_weights`` the weights are computed as well, in N x N memory as PyTorch's. For a query that
    may attend to nothing they are zero, as attention's output is, not NaN. With dropout they are the
    weights after dropout, and the output is computed from them.

    Raises:
        UnsupportedError: ``static_k`` or ``static_v``; with ``attend`` also ``bias_k``, ``bias_v`` and
            ``add_zero_attn``, keys that belong to no token.
    """
    call: Any = _Call(*args, **kwargs)
    more = int(call.bias_k is not None) + call.add_zero_attn
    if more and attend is not None:
        raise UnsupportedError(
            "MultiheadAttention: bias_k, bias_v and add_zero_attn are not supported in layers whose heads "
            "are looked at; build it without add_bias_kv and add_zero_attn"
        )
    if call.static_k is not None or call.static_v is not None:
        raise UnsupportedError("MultiheadAttention: static_k and static_v are not supported")
    batched = call.query.ndim == 3
    (q, k, v), ours = _project(call, batched, project)
    mask = _mask(call, q, k)
    if more:
        k, v = _with_more(call, k, call.bias_k), _with_more(call, v, call.bias_v)
        mask, ours = None if mask is None else F.pad(mask, (0, more)), attention
    causal = call.is_causal and call.key_padding_mask is None and not call.need_weights
    dropout = call.dropout_p if call.training else 0.0
    dropped = Unfused(partial(F.dropout, p=dropout)) if call.need_weights and dropout else None
    options = {"attn_mask": None if causal else mask, "is_causal": causal}
    options["dropout_p"] = 0.0 if dropped else dropout
    attend = partial(attend, dropped) if attend is not None else (dropped or ours)
    heads = attend(q, k, v, **options)
    out = F.linear(heads.transpose(1, 2).flatten(2), call.out_proj_weight, call.out_proj_bias)
    weights = _weights(call, q, k, mask, dropped) if call.need_weights else None
    if not batched:
        return out[0], None if weights is None else weights[0]
    return out.transpose(0, 1), weights


_PARAMETERS = signature(F.multi_head_attention_forward).parameters.values()
_Call = namedtuple(
    "_Call",
    [p.name for p in _PARAMETERS],
    defaults=[p.default for p in _PARAMETERS if p.default is not p.empty],
)
"""The arguments of a call, by name."""


def _project(
    call: Any, batched: bool, project: Project
) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[..., Tensor]]:
    """Compute queries, keys and values, each ``[B, H, N, d]``, and choose attention of these."""

    def samples_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1) if batched else x[None]

    query, key, value = (samples_first(x) for x in (call.query, call.key, call.value))
    key = query if call.key is call.query else key
    value = key if call.value is call.key else value
    biases = (None,) * 3 if call.in_proj_bias is None else call.in_proj_bias.chunk(3)
    if call.use_separate_proj_weight:
        weights = (call.q_proj_weight, call.k_proj_weight, call.v_proj_weight)
    elif key is query and value is key:
        made = project("qkv", query, call.in_proj_weight, call.in_proj_bias)
        packed = PackedAttention(made.unflatten(-1, (3, call.num_heads, -1)))
        return packed.parts, packed
    else:
        weights = call.in_proj_weight.chunk(3)
    each = map(project, "qkv", (query, key, value), weights, biases)
    q, k, v = (x.unflatten(-1, (call.num_heads, -1)).transpose(1, 2) for x in each)
    return (q, k, v), attention


def _with_more(call: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Keys or values ``[B, H, N, d]`` with those behind them that belong to no token: ``bias``, and one of zeros."""
    parts = [x]
    if bias is not None:
        parts.append(bias.view(1, call.num_heads, 1, -1).expand(len(x), -1, -1, -1))
    if call.add_zero_attn:
        parts.append(torch.zeros_like(x[:, :, :1]))
    return torch.cat(parts, 2)


def _mask(call: Any, q: Tensor, k: Tensor) -> Tensor | None:
    """Combine ``attn_mask`` and ``key_padding_mask`` (True: do not attend) into one additive mask."""
    mask = None
    if call.attn_mask is not None:
        mask = _additive(call.attn_mask, q.dtype)
        if mask.ndim == 3:
            mask = mask.view(-1, call.num_heads, *mask.shape[1:]) if len(mask) > 1 else mask[None]
    if call.key_padding_mask is not None:
        padding = _additive(call.key_padding_mask, q.dtype).view(len(k), 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask (True: do not attend) to an additive one; keep an additive one.

    It keeps its dtype: a large finite number that masks would be -inf in a narrower one.
    """
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)


def _weights(
    call: Any, q: Tensor, k: Tensor, mask: Tensor | None, dropped: Unfused | None
) -> Tensor:
    weights = dropped and dropped.weights
    if weights is None:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = masked_softmax(scores, mask, partial(F.softmax, dim=-1))
    return weights.mean(1) if call.average_attn_weights else weights
