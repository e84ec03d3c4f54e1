"""xformers' ``memory_efficient_attention``, differentiable twice; and an operator pair for xformers' own.

>>> from diversevit_fast.integrations.xformers import memory_efficient_attention
>>> out = memory_efficient_attention(q, k, v, attn_bias=xops.LowerTriangularMask())

or, where a model calls ``xops`` itself and one derivative is enough:

>>> xops.memory_efficient_attention(q, k, v, op=(FwOp, BwOp))

xformers marks its own function ``once_differentiable``: through the pair a second derivative raises.
"""

from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedError, require
from ..ops import attention
from ..ops.attention import attention_backward_operator, attention_operator
from .packed_sequences import attend_in_groups, attend_to_nothing, mask_padding
from .xformers_blocks import (
    TYPES,
    WITH_TENSOR,
    Block,
    blocks,
    in_order,
    is_empty,
    is_packed,
    may_be_padded,
    sequences,
    within,
)

_common: Any = require("xformers.ops.fmha.common", extra="xformers")


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """``xformers.ops.memory_efficient_attention``, twice differentiable.

    Args:
        query: ``[B, Mq, H, K]``, or ``[B, Mq, K]`` (one head), or ``[B, Mq, G, H, K]`` (groups of heads).
        key: the same with Mk tokens.
        value: the same with Mk tokens and width Kv.
        attn_bias: None, a tensor ``[B, H, Mq, Mk]`` added to the scores, or any of xformers'
            ``AttentionBias``. Causal and packed (block-diagonal) ones cost no memory of their size, others
            are made tensors. A tensor, also one inside ``LowerTriangularMaskWithTensorBias``, gets
            gradients to second order.
        p: probability that an attention weight is set to zero; the operator pair takes 0 alone.
        scale: of the scores; ``K ** -0.5`` if None.
        op: must be None: there is one operator here.
        output_dtype: of the result; the query's if None.

    Returns:
        ``[B, Mq, H, Kv]``, with the axes of ``query``; zeros in rows that attend to nothing.

    Raises:
        ValueError: shapes, dtypes or devices that xformers refuses.
        UsageError: shapes or dtypes that ``dvf.attention`` refuses.
        UnsupportedError: ``op``; a third derivative.
    """
    if op is not None:
        raise UnsupportedError("op: there is one operator here; leave it None")
    inputs = _common.Inputs(query, key, value, attn_bias, p, scale)
    inputs.validate_inputs()
    shape = inputs.normalize_bmhk()
    q, k, v = (_heads_first(x) for x in (inputs.query, inputs.key, inputs.value))
    if is_packed(inputs.attn_bias):
        out = _attend_packed(q, k, v, inputs.attn_bias, p, scale)
    else:
        (block,) = blocks(inputs.attn_bias, q, k)
        out = _attend(q, k, v, block.mask, block.is_causal, p, scale).transpose(1, 2)
    return out.reshape(shape).to(output_dtype or query.dtype)


def _heads_first(x: Tensor) -> Tensor:
    """``[B, M, H, K]`` or ``[B, M, G, H, K]`` as ``[B, H, M, K]``."""
    return (x.flatten(2, 3) if x.ndim == 5 else x).transpose(1, 2)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    p: float,
    scale: float | None,
) -> Tensor:
    if is_empty(q, k):
        return attend_to_nothing(q, k, v)
    return attention(q, k, v, mask, p, is_causal, scale)


def _attend_packed(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, p: float, scale: float | None
) -> Tensor:
    """``[Mq, H, Kv]`` of q, k, v ``[1, H, M, .]``."""
    found = sequences(bias, q.shape[2], k.shape[2], q.device)
    rows, keys, counts = (list(x) for x in zip(*found, strict=True))
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    if not in_order(keys):
        tokens = torch.arange(k.shape[0], device=k.device)
        index = torch.cat([where if isinstance(where, Tensor) else tokens[where] for where in keys])
        k, v = k[index], v[index]
        ends = list(accumulate(count for _, count in counts))
        keys = [slice(end - count, end) for end, (_, count) in zip(ends, counts, strict=True)]
    spans, key_spans = ([(x.start, x.stop) for x in where] for where in (rows, keys))

    def attend(given: list[Tensor], members: list[int]) -> Tensor:
        group = [counts[i] for i in members]
        q, k, v = (x.transpose(1, 2) for x in given)
        mask, is_causal = within(bias, q.shape[2], k.shape[2], q.device)
        if not is_causal:
            mask = mask_padding(mask, group, q.device)
        return _attend(q, k, v, mask, is_causal, p, scale).transpose(1, 2)

    where = (spans, key_spans, key_spans)
    return attend_in_groups((q, k, v), where, counts, attend, may_be_padded(bias, counts))


class _Both:
    """What the two operators of the pair have in common."""

    SUPPORTED_DEVICES: ClassVar = {"cuda", "cpu", "xpu"}
    SUPPORTED_DTYPES: ClassVar = {torch.float32, torch.float16, torch.bfloat16}
    SUPPORTED_MAX_K = 256
    SUPPORTED_ATTN_BIAS_TYPES = TYPES
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_DIFFERENT_VALUE_EMBED = True
    VARLEN_LSE_PACKED = True  # [1, H, tokens of all sequences]

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Why these inputs are refused; nothing in the list: they are not."""
        reasons = super().not_supported_reasons(d)  # pyright: ignore[reportAttributeAccessIssue]
        if type(d.attn_bias) is WITH_TENSOR and d.attn_bias._bias.requires_grad:
            reasons.append(
                "xformers passes no gradient to the tensor in LowerTriangularMaskWithTensorBias; "
                "diversevit_fast.integrations.xformers.memory_efficient_attention does"
            )
        return reasons


class FwOp(_Both, _common.AttentionFwOpBase):
    """The forward operator for ``xops.memory_efficient_attention(..., op=(FwOp, BwOp))``: first order only."""

    OPERATOR = torch.ops.diversevit.attention
    SUPPORTS_BMGHK = True  # xformers' own backward pass takes no such inputs
    NAME = "diversevitF"

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[Tensor, Any]:
        """``[B, Mq, H, Kv]`` and, where asked for, what the backward pass needs.

        Raises:
            UnsupportedError: a bias that wants a gradient where q, k, v want none: xformers would
                give it none without a word.
        """
        bias = inp.attn_bias
        if torch.is_grad_enabled() and isinstance(bias, Tensor) and bias.requires_grad:
            raise UnsupportedError(
                "attn_bias: xformers gives it no gradient unless query, key or value needs one; use "
                "diversevit_fast.integrations.xformers.memory_efficient_attention"
            )
        q, k, v = (_heads_first(x) for x in (inp.query, inp.key, inp.value))
        parts = [_forward(q, k, v, block, inp.scale_float) for block in blocks(bias, q, k)]
        out, lse = (_joined(list(x)) for x in zip(*parts, strict=True))
        out = out.transpose(1, 2).unflatten(2, inp.query.shape[2:-1])
        if not needs_gradient:
            return out, None
        lse = lse.unflatten(1, inp.query.shape[2:-1])
        return out, _common.Context(lse=lse, out=out, op_bw=BwOp)


class BwOp(_Both, _common.AttentionBwOpBase):
    """The backward operator of the pair; it takes what ``FwOp`` kept."""

    OPERATOR = torch.ops.diversevit.attention_backward
    SUPPORTS_ATTN_BIAS_GRAD = True
    NAME = "diversevitB"

    @classmethod
    def apply(cls, ctx: Any, inp: Any, grad: Tensor) -> Any:
        """``dq, dk, dv`` like the inputs, and ``db`` where the bias is a tensor that needs it."""
        bias = inp.attn_bias
        wanted = isinstance(bias, Tensor) and bias.requires_grad
        q, k, v, o, do = (
            _heads_first(x) for x in (inp.query, inp.key, inp.value, ctx.out, grad.to(inp.query))
        )
        lse = ctx.lse.flatten(1, -2)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        db, scale = torch.zeros_like(bias) if wanted else None, inp.scale_float
        for block in blocks(bias, q, k):
            rows, qkv = block.queries, block.cut(q, k, v)
            if is_empty(*qkv[:2]):
                continue
            dq[:, :, rows], *key_grads, dmask = attention_backward_operator(
                *(*qkv, block.mask, None),
                *(o[:, :, rows], _statistics(*qkv, block, lse[:, :, rows], scale), do[:, :, rows]),
                *(block.is_causal, scale, 0.0, wanted),
            )
            for total, part in zip((dk, dv), key_grads, strict=True):
                _add(total, block.keys, part)
            db = dmask.view_as(bias) if wanted else None
        return _common.Gradients(*(x.transpose(1, 2) for x in (dq, dk, dv)), db=db)


def _add(total: Tensor, keys: slice | Tensor, part: Tensor) -> None:
    """Sequences may share keys."""
    if isinstance(keys, Tensor):
        total.index_add_(2, keys, part)
    else:
        total[:, :, keys] += part


def _forward(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = block.cut(q, k, v)
    if is_empty(q, k):
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        return (q @ k.mT) @ v, lse
    out, softmax = attention_operator(q, k, v, block.mask, None, block.is_causal, scale, 0.0)
    top, share = softmax.unbind(2)
    return out, top - share.log()


def _statistics(q: Tensor, k: Tensor, v: Tensor, block: Block, lse: Tensor, scale: float) -> Tensor:
    """(1a) ``[B, H, 2, Mq]``, of which xformers keeps the log-sum-exp alone.

    An added mask may hold numbers so large that nothing is left of the sum in it: then it is made again.
    """
    if block.mask is not None and block.mask.dtype != torch.bool:
        return attention_operator(q, k, v, block.mask, None, block.is_causal, scale, 0.0)[1]
    return torch.stack((lse, torch.ones_like(lse)), 2)
