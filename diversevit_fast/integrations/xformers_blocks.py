"""Which queries meet which keys: xformers' ``attn_bias``, taken apart into plain attention calls.

Sequences packed side by side (the block-diagonal biases, padded, gappy and paged ones too) are one
block each, or one call for all of like length: nothing of the size of the whole packed batch squared is made, and
keys that belong to no sequence are not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import require, usage_error
from ..ops.checks import shape_error
from .packed_sequences import Count

_biases: Any = require("xformers.ops.fmha.attn_bias", extra="xformers")

_ALL_KEYS = (
    _biases.BlockDiagonalMask,
    _biases.BlockDiagonalPaddedKeysMask,
    _biases.BlockDiagonalGappyKeysMask,
    _biases.PagedBlockDiagonalPaddedKeysMask,
    _biases.PagedBlockDiagonalGappyKeysMask,
)
_CAUSAL = (_biases.LowerTriangularMask, _biases.BlockDiagonalCausalMask)
_CAUSAL_FROM_BOTTOM_RIGHT = (
    _biases.LowerTriangularFromBottomRightMask,
    _biases.BlockDiagonalCausalFromBottomRightMask,
    _biases.BlockDiagonalCausalWithOffsetPaddedKeysMask,
    _biases.BlockDiagonalCausalWithOffsetGappyKeysMask,
    _biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
    _biases.PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
)
_WINDOWS = (
    _biases.LocalAttentionFromBottomRightMask,
    _biases.LowerTriangularFromBottomRightLocalAttentionMask,
    _biases.BlockDiagonalCausalLocalAttentionMask,
    _biases.BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    _biases.BlockDiagonalLocalAttentionPaddedKeysMask,
    _biases.BlockDiagonalCausalLocalAttentionPaddedKeysMask,
)
WITH_TENSOR = _biases.LowerTriangularMaskWithTensorBias
TYPES = (
    *(type(None), Tensor, WITH_TENSOR),
    *(*_ALL_KEYS, *_CAUSAL, *_CAUSAL_FROM_BOTTOM_RIGHT, *_WINDOWS),
)
"""The biases known by name; others are made tensors by their own ``materialize``."""


Keys = slice | Tensor


@dataclass(frozen=True)
class Block:
    """One attention call: its queries, its keys (an index tensor where they lie in pages), its mask."""

    queries: slice
    keys: Keys
    mask: Tensor | None = None
    is_causal: bool = False

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its queries, keys and values out of ``[B, H, M, .]``."""
        return q[:, :, self.queries], k[:, :, self.keys], v[:, :, self.keys]


def is_empty(q: Tensor, k: Tensor) -> bool:
    """Whether there is nothing to attend with or to; operators do not take that."""
    return q.shape[2] == 0 or k.shape[2] == 0


def blocks(bias: Any, q: Tensor, k: Tensor) -> list[Block]:
    """The calls that make up attention under ``bias``.

    Args:
        bias: None, a tensor ``[B, H, Mq, Mk]`` (or ``[B, G, H / G, Mq, Mk]``) or an ``AttentionBias``.
        q: ``[B, H, Mq, K]``.
        k: ``[B, H, Mk, K]``.

    Raises:
        UsageError: a tensor of another shape; a packed bias whose sequences have another number of
            queries, or more keys.
    """
    kind, queries, keys = type(bias), q.shape[2], k.shape[2]
    if is_packed(bias):
        return [
            Block(where, where_keys, *within(bias, *count, q.device))
            for where, where_keys, count in sequences(bias, queries, keys, q.device)
        ]
    whole = (slice(0, queries), slice(0, keys))
    if bias is None:
        return [Block(*whole)]
    shape = (*q.shape[:2], queries, keys)
    if isinstance(bias, Tensor):
        return [Block(*whole, _over_heads(bias, shape))]
    if kind is WITH_TENSOR:
        unseen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1)
        return [Block(*whole, _over_heads(bias._bias, shape).masked_fill(unseen, -torch.inf))]
    if kind in TYPES:
        return [Block(*whole, *within(bias, queries, keys, q.device))]
    return [Block(*whole, bias.materialize(shape, dtype=q.dtype, device=q.device))]


def _over_heads(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    flat = bias.flatten(1, 2) if bias.ndim == 5 else bias
    if flat.shape != shape:
        raise shape_error("attn_bias", str(list(shape)), bias, "expand it: nothing is broadcast")
    return flat


def is_packed(bias: Any) -> bool:
    """Whether ``bias`` is of sequences side by side."""
    return type(bias) in TYPES and hasattr(bias, "k_seqinfo")


def sequences(
    bias: Any, queries: int, keys: int, device: torch.device
) -> Iterator[tuple[slice, Keys, Count]]:
    """Of each sequence of a packed bias: where its queries and its keys are, and how many.

    Raises:
        UsageError: the bias is of another number of queries, or of more keys.
    """
    wanted = bias.q_seqinfo.seqstart_py[-1]
    if wanted != queries:
        raise usage_error(
            "query", f"{wanted} tokens, attn_bias's", queries, "pack what the bias says"
        )
    rows = zip(bias.q_seqinfo.intervals(), _keys(bias, device), strict=True)
    for (start, end), (where, count, last) in rows:
        if last > keys:
            raise usage_error("key", f"{last} tokens or more", keys, "pack what attn_bias says")
        yield slice(start, end), where, (end - start, count)


def in_order(keys: list[Keys]) -> bool:
    """Whether they are slices, ascending and disjoint; pages are not, and sequences may share them."""
    slices = [x for x in keys if isinstance(x, slice)]
    return len(slices) == len(keys) and all(x.stop <= y.start for x, y in pairwise(slices))


def may_be_padded(bias: Any, counts: list[Count]) -> bool:
    """Whether no query of a packed bias would see more keys if its sequence were longer, but for padding."""
    kind = type(bias)
    causal = kind in (*_CAUSAL, *_CAUSAL_FROM_BOTTOM_RIGHT)
    return kind in _ALL_KEYS or (causal and all(queries == keys for queries, keys in counts))


def _keys(bias: Any, device: torch.device) -> Iterator[tuple[Keys, int, int]]:
    """Of each sequence: where its keys are, how many, and how many tokens that takes."""
    if not hasattr(bias, "block_tables"):
        for start, end in bias.k_seqinfo.intervals():
            yield slice(start, end), end - start, end
        return
    gappy = isinstance(bias, _biases.PagedBlockDiagonalGappyKeysMask)
    starts = bias.k_seqinfo.seqstart_py if gappy else [0] * len(bias.block_tables)
    size = bias.page_size
    for pages, start, end in zip(bias.block_tables, starts, bias.k_seqinfo.seqlen_py, strict=False):
        place = torch.arange(start, end, device=device)
        where = pages.to(device).long()[place // size] * size + place % size
        yield where, end - start, int(where.max()) + 1 if end > start else 0


def within(bias: Any, queries: int, keys: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """The mask inside one block, ``[1, 1, Mq, Mk]`` (True: attend), or whether it is causal."""
    kind = type(bias)
    if kind in _ALL_KEYS:
        return None, False
    if kind in _CAUSAL or (kind in _CAUSAL_FROM_BOTTOM_RIGHT and queries == keys):
        return None, True
    if kind in _CAUSAL_FROM_BOTTOM_RIGHT:
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        return seen.tril(keys - queries), False
    window = getattr(bias, "_create_block_mask", bias.materialize)
    return window((1, 1, queries, keys), dtype=torch.float32, device=device) == 0, False
