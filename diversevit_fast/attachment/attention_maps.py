"""Attention maps: the probabilities of chosen queries, from which a model's heads are then computed.

Attention never makes the probabilities ``[Nq, Nk]``. Here the rows of chosen queries are made by the formula, and
the head outputs of these queries from the rows, so that the rest of the model depends on them. The head outputs of
the other queries are what the model's own attention gives.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UnsupportedError, usage_error
from ..ops.attention import cast_for_autocast
from .attention_modules import AttentionLayer, plain_class
from .indices import as_list, describe, whole_number
from .seen_attention import SeenAttention
from .torch_calls import Forward
from .unfused_attention import Unfused

Queries = str | tuple[int, ...]
"""``"class"``, ``"all"``, or indices, of which negative ones count from the end."""

_MOST_QUERIES = 1 << 20


def chosen_queries(maps: Any) -> Queries | None:
    """Read the argument ``maps``; None if no maps are asked for.

    Raises:
        UsageError: an unknown word, no index, or one that is given twice.
    """
    if maps is None or maps is False:
        return None
    if maps is True or (isinstance(maps, str) and maps in ("class", "all")):
        return "class" if maps is True else maps
    given = as_list(maps, _MOST_QUERIES)
    numbers = [whole_number(x) for x in given or ()]
    found = tuple(x for x in numbers if x is not None)
    if not found or len(found) < len(numbers) or len(found) > _MOST_QUERIES:
        got = describe(maps if given is None else given)
        hint = "True means 'class'; a boolean mask is not an index"
        raise usage_error("maps", "'class', 'all', None or indices of queries", got, hint)
    if len(set(found)) < len(found):
        raise usage_error("maps", "each query once", describe(given), "remove the repetition")
    return found


def refuse_windows(layers: list[AttentionLayer]) -> None:
    """Refuse ``maps="class"`` of layers that attend within windows of an image, which hold no class token."""
    for layer in layers:
        name = plain_class(layer.module).__name__
        if any(word in name for word in ("Window", "Swin", "LocallyGrouped")):
            raise UnsupportedError(
                f"maps='class': {layer.name} ({name}) attends within windows, which have no class token; "
                "pass maps='all' or indices of queries for the maps of every window"
            )


class AttentionMaps(SeenAttention):
    """Attention by ``attend``, but of chosen queries by their probabilities.

    Attributes:
        attend: computes attention of the other queries.
        map: the probabilities ``[B, H, Q, Nk]`` of the last call, at least in float32; after dropout, if any.
    """

    map: Tensor

    def __init__(self, attend: Forward, queries: Queries):
        self.attend, self._queries = attend, queries

    def compute(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        tokens = q.shape[-2]
        rows = self._rows(tokens, q.device)
        every = isinstance(rows, slice) and rows.stop - rows.start == tokens
        if isinstance(self.attend, Unfused):
            heads, weights = self.attend(q, k, v, **options), self.attend.weights
            assert weights is not None
            if every:
                self.map = weights
                return heads
            self.map = _take(weights, rows)
            groups = self.map.shape[-3] // v.shape[-3]
            return _put(heads, rows, self.map @ v.repeat_interleave(groups, -3))
        q, k, v = cast_for_autocast(q, k, v)
        own, self.map = _by_formula(q, k, v, rows, **options)
        return own if every else _put(self.attend(q, k, v, **options), rows, own)

    def _rows(self, tokens: int, device: torch.device) -> slice | Tensor:
        if isinstance(self._queries, str):
            return slice(0, 1 if self._queries == "class" else tokens)
        if not all(-tokens <= i < tokens for i in self._queries):
            wanted = f"indices from {-tokens} to {tokens - 1}"
            raise usage_error(
                "maps", wanted, describe(list(self._queries)), f"there are {tokens} queries"
            )
        rows = [i % tokens for i in self._queries]
        if len(set(rows)) < len(rows):
            got = describe(list(self._queries))
            raise usage_error(
                "maps", f"each of {tokens} queries once", got, "remove the repetition"
            )
        return _index(rows, device)


def _index(rows: list[int], device: torch.device) -> Tensor:
    """``rows`` as a tensor, made on the device: a copy from the host is waited for, and is in no CUDA graph."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if all(b - a == step for a, b in pairwise(rows)):
        return torch.arange(rows[0], rows[-1] + step, step, device=device)
    return torch.cat([torch.arange(row, row + 1, device=device) for row in rows])


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[..., rows, :] if isinstance(rows, slice) else x.index_select(-2, rows)


def _by_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: slice | Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The head outputs of queries ``rows``, and their probabilities, which are computed in float32 at least."""
    if is_causal:
        query, key = (torch.arange(x.shape[-2], device=q.device) for x in (q, k))
        attn_mask = key <= _take(query[:, None], rows)
    elif attn_mask is not None and attn_mask.ndim > 1 and attn_mask.shape[-2] > 1:
        attn_mask = _take(attn_mask, rows)
    steps = Unfused(partial(F.dropout, p=dropout_p), partial(F.softmax, dim=-1))
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (_take(q, rows), k, v)]
    with torch.autocast(q.device.type, enabled=False):
        own = steps.compute(*wide, attn_mask=attn_mask, **options)
    assert steps.weights is not None
    return own.to(v.dtype), steps.weights


def _put(heads: Tensor, rows: slice | Tensor, own: Tensor) -> Tensor:
    """``heads`` with ``own`` in place of the queries ``rows``."""
    own = own.to(heads.dtype)
    if isinstance(rows, slice):
        return heads.slice_scatter(own, -2, rows.start, rows.stop)
    return heads.index_copy(-2, rows, own)
