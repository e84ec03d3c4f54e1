"""flash-attn's functions for sequences packed side by side (``varlen``), differentiable twice.

Memory is O(tokens): sequences of like length are computed by one call, and nothing as large as all queries times all
keys is made. The lengths decide which calls there are, so ``cu_seqlens`` on a GPU is read there once per call, which
waits for the GPU; ``cu_seqlens`` on the CPU are taken as well, and cost no wait.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UnsupportedError, usage_error
from ..ops import attention, attention_qkvpacked
from ..ops.attention_qkvpacked import split_qkv
from .flash_attn_options import Window, attention_mask, check_slopes, refuse
from .packed_sequences import Span, attend_in_groups, attend_to_nothing, mask_padding


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """``flash_attn.flash_attn_varlen_func``, twice differentiable.

    Args:
        q: ``[tokens, H, d]``, sequence after sequence.
        k: ``[key tokens, Hk, d]``, where Hk divides H.
        v: ``[key tokens, Hk, dv]``.
        cu_seqlens_q: ``[sequences + 1]``, integers: where each sequence begins in q, and where the last ends.
            A sequence may be empty; tokens behind the last belong to none.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: at least the largest number of queries.
        max_seqlen_k: at least the largest number of keys.
        block_table: must be None. The other arguments are those of ``flash_attn_func``.

    Returns:
        ``[tokens, H, dv]``; zeros in rows that attend to nothing.

    Raises:
        UsageError: as ``flash_attn_func``; lengths that do not fit the tensors or each other.
        UnsupportedError: as ``flash_attn_func``; ``block_table``.
    """
    if block_table is not None:
        raise UnsupportedError("block_table: pages are for generation; pass None")
    refuse(softcap, return_attn_probs)
    starts, key_starts = _read(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    spans = _spans("cu_seqlens_q", starts, q, max_seqlen_q)
    key_spans = _spans("cu_seqlens_k", key_starts, k, max_seqlen_k)
    options = (dropout_p, softmax_scale, causal, window_size, alibi_slopes)
    return _attend((q, k, v), (spans, key_spans, key_spans), *options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """``flash_attn.flash_attn_varlen_kvpacked_func``, twice differentiable.

    Args:
        q: ``[tokens, H, d]``.
        kv: ``[key tokens, 2, Hk, d]``. The other arguments are those of ``flash_attn_varlen_func``.

    Returns:
        ``[tokens, H, d]``.

    Raises:
        UsageError, UnsupportedError: as ``flash_attn_varlen_func``.
    """
    k, v = kv.unbind(1)
    where = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return flash_attn_varlen_func(q, k, v, *where, *rest, deterministic, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """``flash_attn.flash_attn_varlen_qkvpacked_func``, twice differentiable.

    Args:
        qkv: ``[tokens, 3, H, d]``. The other arguments are those of ``flash_attn_varlen_func``.

    Returns:
        ``[tokens, H, d]``.

    Raises:
        UsageError, UnsupportedError: as ``flash_attn_varlen_func``.
    """
    refuse(softcap, return_attn_probs)
    (starts,) = _read(cu_seqlens=cu_seqlens)
    spans = _spans("cu_seqlens", starts, qkv, max_seqlen)
    options = (dropout_p, softmax_scale, causal, window_size, alibi_slopes)
    return _attend((qkv,), (spans,), *options)


_MADE = "it holds running sums of the lengths"


def _read(**starts: Tensor) -> list[list[int]]:
    """The numbers in ``cu_seqlens``, of both with one wait for the GPU."""
    for name, x in starts.items():
        if x.ndim != 1 or not len(x) or x.dtype not in (torch.int32, torch.int64):
            got = f"{list(x.shape)} of {x.dtype}"
            raise usage_error(name, "[sequences + 1] of torch.int32", got, _MADE)
    first, *others = starts.values()
    if all(x is first for x in others):
        return [first.tolist()] * len(starts)
    if any(x.shape != first.shape for x in others):
        sizes = " and ".join(str(len(x)) for x in starts.values())
        raise usage_error(
            " and ".join(starts), "one length", sizes, "a sequence has a place in both"
        )
    return torch.stack([first, *(x.to(first.device) for x in others)]).tolist()


def _spans(name: str, starts: list[int], x: Tensor, longest: int) -> list[Span]:
    """Where the sequences lie in ``x``, ``[tokens, ...]``."""
    spans = list(pairwise(starts))
    if starts[0] != 0 or any(end < start for start, end in spans):
        raise usage_error(name, "0 first and no smaller number after a larger one", starts, _MADE)
    if starts[-1] > x.shape[0]:
        raise usage_error(name, f"{x.shape[0]} tokens at most", starts[-1], _MADE)
    found = max((end - start for start, end in spans), default=0)
    if longest < found:
        argument = name.replace("cu_seqlens", "max_seqlen")
        raise usage_error(
            argument, f"{found} or more, as {name} says", longest, "pass the largest length"
        )
    return spans


def _attend(
    tensors: tuple[Tensor, ...],
    spans: tuple[list[Span], ...],
    dropout_p: float,
    scale: float | None,
    causal: bool,
    window: Window,
    slopes: Tensor | None,
) -> Tensor:
    """Attention of q, k, v or of qkv, each cut into sequences by its spans."""
    heads, sequences, tokens = tensors[0].shape[-2], len(spans[0]), tensors[0].shape[0]
    check_slopes(slopes, sequences, heads)
    lengths = [[end - start for start, end in where] for where in (spans[0], spans[-1])]
    counts = list(zip(*lengths, strict=True))
    causal = causal or window[1] == 0
    alike = all(queries == keys for queries, keys in counts)
    may_pad = alike or not (causal or slopes is not None or max(window) >= 0)
    ends = [where[-1][1] if where else 0 for where in spans]
    if ends[0] < tokens or not sequences:  # a sequence of its own, without keys
        counts.append((tokens - ends[0], 0))
        rest = [(ends[0], tokens), *((end, end) for end in ends[1:])]
        spans = tuple([*where, place] for where, place in zip(spans, rest, strict=True))

    def attend(given: list[Tensor], members: list[int]) -> Tensor:
        group = [counts[i] for i in members]
        queries, keys = map(max, zip(*group, strict=True))
        packed = given[0] if len(given) == 1 else None
        q, k, v = split_qkv(packed) if packed is not None else (x.transpose(1, 2) for x in given)
        if not queries or not keys:
            return attend_to_nothing(q, k, v).transpose(1, 2)
        own = slopes
        if slopes is not None and slopes.ndim == 2:
            own = torch.stack([slopes[i] for i in members])
        mask, is_causal = attention_mask(q.transpose(1, 2), keys, causal, window, own)
        if not causal:
            mask = mask_padding(mask, group, q.device)
        if packed is not None and mask is None:
            return attention_qkvpacked(
                packed, is_causal=is_causal, scale=scale, dropout_p=dropout_p
            )
        options = (mask, dropout_p, is_causal, scale, q.shape[1] != k.shape[1])
        return attention(q, k, v, *options).transpose(1, 2)

    return attend_in_groups(tensors, spans, counts, attend, may_pad)
