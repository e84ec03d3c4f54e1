"""Attention of sequences that lie side by side in one tensor: one call for all of like length.

The tokens of each tensor are gathered once, into the groups that one call computes; the derivative of that is to join
the groups again, and the other way round. So every order takes O(tokens), however many sequences there are: a slice's
derivative would make a tensor of the whole batch for every sequence.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..attachment.attachment import Attachment
from ..attachment.torch_calls import open_attachments
from ..errors import UnsupportedError

Span = tuple[int, int]
Count = tuple[int, int]
"""How many queries and keys a sequence has."""


def attend_in_groups(
    tensors: Sequence[Tensor],
    spans: Sequence[Sequence[Span]],
    counts: Sequence[Count],
    attend: Callable[[list[Tensor], list[int]], Tensor],
    may_pad: bool,
) -> Tensor:
    """Attention of each sequence to itself, ``[tokens, H, dv]`` like the first tensor.

    Args:
        tensors: ``[tokens, ...]`` each: what ``attend`` takes.
        spans: of each tensor, where the sequences lie in it, disjoint; they cover the first tensor.
        counts: of each sequence.
        attend: takes the tensors of a group of sequences, ``[G, n, ...]`` with the longest one's n, and the
            sequences' numbers; returns ``[G, n, H, dv]``, of which rows beyond a sequence's end are dropped.
        may_pad: sequences of almost the same length share a call, at most eight calls for each doubling of
            the length; else those of equal length do. Shorter ones are followed by zeros, which ``attend``
            masks as keys.

    Raises:
        UnsupportedError: inside a layer whose heads a context captures, chooses or penalises, unless all
            sequences are of one length.
    """
    groups: dict[Count, list[int]] = {}
    for i, count in enumerate(counts):
        like = (_rounded(count[0]), _rounded(count[1])) if may_pad else count
        groups.setdefault(like, []).append(i)
    members = list(groups.values())
    if len(set(counts)) > 1:
        _refuse_attachments()
    orders: list[_Order] = []
    for x, where in zip(tensors, spans, strict=True):
        known = (y for y in orders if y.spans == where and y.tokens == len(x))
        orders.append(next(known, None) or _Order(where, members, x))
    pieces = [_Separate.apply(x, y) for x, y in zip(tensors, orders, strict=True)]
    made = [attend(list(given), group) for *given, group in zip(*pieces, members, strict=True)]
    return _Join.apply(orders[0], *made)


def _refuse_attachments() -> None:
    """Refuse sequences of several lengths where their heads are looked at: they lie in groups, some padded."""
    for other in open_attachments():
        layer = other.running_layer() if isinstance(other, Attachment) else None
        if layer is not None:
            raise UnsupportedError(
                f"model: {layer.name} attends to packed sequences of several lengths, whose heads are no one "
                "tensor [B, H, N, d]; pass sequences of one length, or padded ones with a mask"
            )


def _rounded(n: int) -> int:
    """``n`` rounded up to a sixteenth of a power of two, and to 16."""
    step = max(16, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step


class _Order:
    """Where the tokens of a tensor go: group after group of its sequences, each padded to its group's longest."""

    def __init__(self, spans: Sequence[Span], groups: Sequence[Sequence[int]], like: Tensor):
        self.spans, self.tokens = spans, len(like)
        found = [[spans[i] for i in group] for group in groups]
        self.shapes = [(len(x), max(end - start for start, end in x)) for x in found]
        table = [
            (start, end - start, n)
            for group, (_, n) in zip(found, self.shapes, strict=True)
            for start, end in group
        ]
        starts, lengths, padded = torch.tensor(table, device="cpu").T
        sequence = torch.arange(len(table), device="cpu").repeat_interleave(padded)
        place = torch.arange(len(sequence), device="cpu")
        within = place - (padded.cumsum(0) - padded)[sequence]
        real = within < lengths[sequence]
        index = starts[sequence] + within * real
        inverse = torch.full((self.tokens,), len(index), device="cpu")
        inverse[index[real]] = place[real]
        self.covers = int(lengths.sum()) == self.tokens  # else join to a row of zeros
        self.indices: list[Tensor] | None = None  # None: all stay where they are
        if not torch.equal(index, torch.arange(self.tokens, device="cpu")):
            indices = (index, place[~real], inverse)
            self.indices = [x.to(like.device, non_blocking=True) for x in indices]


class _Separate(Function):
    """``[tokens, ...]`` to a tensor ``[G, n, ...]`` for every group."""

    @staticmethod
    def forward(x: Tensor, order: _Order) -> tuple[Tensor, ...]:
        if order.indices is not None:
            index, padding, _ = order.indices
            x = x.index_select(0, index).index_fill_(0, padding, 0.0)
        pieces = x.split([count * n for count, n in order.shapes])
        return tuple(y.unflatten(0, n) for y, n in zip(pieces, order.shapes, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Order], output: tuple[Tensor, ...]) -> None:
        ctx.order = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _Join.apply(ctx.order, *grads), None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, _: None) -> tuple[Tensor, ...]:
        return _Separate.apply(x, ctx.order)

    @staticmethod
    def vmap(_: Any, in_dims: tuple[Any, ...], x: Tensor, order: _Order) -> tuple[Any, ...]:
        made = _Separate.apply(x.movedim(in_dims[0], 1), order)  # the mapped axis behind the tokens
        return made, (2,) * len(made)


class _Join(Function):
    """The tensors ``[G, n, ...]`` of all groups to ``[tokens, ...]``; zeros where no sequence is."""

    @staticmethod
    def forward(order: _Order, *pieces: Tensor) -> Tensor:
        flat = [x.flatten(0, 1) for x in pieces]
        if not order.covers:
            flat.append(flat[0].new_zeros(1, *flat[0].shape[1:]))
        x = torch.cat(flat)
        return x if order.indices is None else x.index_select(0, order.indices[2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.order = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *_Separate.apply(grad, ctx.order)

    @staticmethod
    def jvp(ctx: Any, _: None, *pieces: Tensor) -> Tensor:
        return _Join.apply(ctx.order, *pieces)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], order: _Order, *pieces: Tensor) -> Any:
        size = info.batch_size
        lifted = (
            x[:, :, None].expand(*x.shape[:2], size, *x.shape[2:])
            if dim is None
            else x.movedim(dim, 2)
            for x, dim in zip(pieces, in_dims[1:], strict=True)
        )
        return _Join.apply(order, *lifted), 1


def mask_padding(
    mask: Tensor | None, counts: Sequence[Count], device: torch.device
) -> Tensor | None:
    """``mask`` without the keys that a sequence of a group does not have: ``[G, 1, 1, n]`` if it is None.

    Made where it is used: nothing is copied to a GPU, which would wait.
    """
    longest = max(keys for _, keys in counts)
    if all(keys == longest for _, keys in counts):
        return mask
    seen = torch.ones(2 * longest, dtype=torch.bool, device=device)
    seen[longest:] = False
    rows = [seen[longest - keys : 2 * longest - keys] for _, keys in counts]
    own = torch.stack(rows)[:, None, None]
    if mask is None:
        return own
    return mask & own if mask.dtype == torch.bool else mask.masked_fill(~own, -torch.inf)


def attend_to_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros ``[B, H, Nq, dv]`` where there are no queries or no keys, which operators do not take.

    They are joined in the graph to q, k, v ``[B, H or fewer, N, d]``.
    """
    k, v = (x[:, :, :0].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT) @ v
