"""Data parallelism: what DDP, FSDP2 and HSDP send, and what they do to memory.

FSDP2 is counted as the examples use it: ``fully_shard`` of each block, then of the model, with PyTorch's own settings.
"""

import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..attachment.attention_modules import attention_layers, choose_layers
from ..errors import usage_error

MOST_RANKS = 1 << 20
NODE = 8
"""GPUs of a node, whose links are faster than the network."""
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20
"""Bytes of gradients that DDP waits for before it reduces them: at first, and then."""


class Parallel(NamedTuple):
    """Processes, each with the batch.

    Attributes:
        kind: ``"ddp"``, ``"fsdp2"`` or ``"hsdp"``.
        replicas: copies of the parameters, each of which one process (DDP) or several (FSDP2) hold.
        shards: processes that hold a copy together.
        keeps: whether blocks keep what they gathered for the forward (``reshard_after_forward=False``).
    """

    kind: str
    replicas: int
    shards: int
    keeps: bool = False

    @property
    def ranks(self) -> int:
        return self.replicas * self.shards


def parallel_of(parallel: object) -> Parallel | None:
    """What ``"ddp:8"``, ``"fsdp2:16"`` or ``"hsdp:2x8"`` says; None for one process.

    Raises:
        UsageError: it says something else.
    """
    if parallel is None:
        return None
    words = r"(?:(ddp):(\d{1,7})|(fsdp2):(\d{1,7})(:keep)?|(hsdp):(\d{1,7})x(\d{1,7})(:keep)?)"
    found = re.fullmatch(words, parallel) if isinstance(parallel, str) else None
    if found is not None:
        ddp, copies, fsdp2, shards, keep, _, rows, columns, kept = found.groups()
        if ddp:
            wanted = Parallel(ddp, int(copies), 1)
        elif fsdp2:
            wanted = Parallel(fsdp2, 1, int(shards), keep is not None)
        else:
            wanted = Parallel("hsdp", int(rows), int(columns), kept is not None)
        if 1 <= wanted.ranks <= MOST_RANKS:
            return wanted
    expected = (
        "ddp:N, fsdp2:N, or hsdp:RxS for R replicas of S processes, and :keep after the last two"
    )
    raise usage_error("parallel", expected, reprlib.repr(parallel), "say ddp:8")


class Size(NamedTuple):
    """Of a parameter: its first axis, which FSDP2 spreads, the bytes of an entry of it, and whether it is trained."""

    rows: int
    row_bytes: int
    trained: bool


class Layout(NamedTuple):
    """The parameters of a model as ``fully_shard`` groups them.

    Attributes:
        groups: those of each block, in the order of the forward, then of the rest, which the model itself gathers.
        lowest: index of the block at which the penalty's own backward pass ends; None without a penalty.
    """

    groups: tuple[tuple[Size, ...], ...]
    lowest: int | None

    def bytes(self, shards: int, trained: bool = False) -> int:
        """Bytes of all parameters, or of those that are trained, as so many processes hold them together."""
        return sum(padded(group, shards, trained) for group in self.groups)


def layout_of(model: nn.Module, diversity: Mapping[str, Any] | None) -> Layout:
    """Group a model's parameters; blocks are the items of lists of modules in which attention layers lie."""
    layers = attention_layers(model)
    names = list(dict.fromkeys(_block_of(model, layer.name) for layer in layers))
    lowest = None
    if diversity is not None:
        chosen = choose_layers(model, diversity.get("layers", "last"))
        first = min(chosen, key=lambda layer: layer.index)
        lowest = names.index(_block_of(model, first.name))
    seen: set[int] = set()
    groups = [_sizes(model.get_submodule(name).parameters(), seen) for name in names]
    return Layout((*groups, _sizes(model.parameters(), seen)), lowest)


def padded(group: Iterable[Size], shards: int, trained: bool = False) -> int:
    """Bytes of parameters whose first axes are filled up to a multiple of ``shards``."""
    return sum(
        -(-one.rows // shards) * shards * one.row_bytes
        for one in group
        if one.trained or not trained
    )


class Traffic(NamedTuple):
    """What each process does in a step, by collective operation.

    Attributes:
        calls: how many.
        sent: bytes that it sends, in rings.
    """

    calls: dict[str, float]
    sent: dict[str, float]


def traffic_of(parallel: Parallel | None, layout: Layout, every: int) -> Traffic:
    """Count the collective operations of a step whose backward pass goes through all blocks.

    DDP reduces all gradients, in buckets, to everybody. FSDP2 gathers each group of parameters for the forward, frees
    those of blocks, and gathers them once more for the first backward pass that needs them: the penalty's own leaves
    what it gathered for the last. But FSDP2 prefetches the block below those that a backward pass needs, and drops
    it at the pass's end: with a penalty that block is gathered a third time. Gradients are scattered, and those of
    HSDP then reduced between replicas.
    """
    if parallel is None:
        return Traffic({}, {})
    among, between = 1 - 1 / parallel.shards, 1 - 1 / parallel.replicas
    if parallel.kind == "ddp":
        trained = [one for group in layout.groups for one in group if one.trained]
        buckets = float(_buckets([one.rows * one.row_bytes for one in trained]))
        sent = 2 * between * layout.bytes(1, trained=True)
        return Traffic({"all-reduce": buckets}, {"all-reduce": sent})
    gathered = [(group, 1.0) for group in layout.groups]
    if not parallel.keeps:
        gathered += [(group, 1.0) for group in layout.groups[:-1]]
        if layout.lowest:
            gathered.append((layout.groups[layout.lowest - 1], 1 / every))
    gathered = [(group, times) for group, times in gathered if group]
    reduced = float(sum(any(one.trained for one in group) for group in layout.groups))
    trained = layout.bytes(parallel.shards, trained=True)
    calls, sent = {}, {}
    if parallel.shards > 1:
        calls = {"all-gather": sum(times for _, times in gathered), "reduce-scatter": reduced}
        size = sum(times * padded(group, parallel.shards) for group, times in gathered)
        sent = {"all-gather": among * size, "reduce-scatter": among * trained}
    if parallel.kind == "hsdp":
        calls["all-reduce"] = reduced
        sent["all-reduce"] = 2 * between * trained / parallel.shards
    return Traffic(calls, sent)


def sending_seconds(
    parallel: Parallel, sent: Mapping[str, float], link: float, network: float
) -> float:
    """Seconds of sending ``sent``, one after the other; 0 where no rate is known.

    Args:
        link: bytes per second inside a node, which shards of HSDP are in where they fit.
        network: between nodes.
    """
    inside = parallel.ranks if parallel.kind != "hsdp" else parallel.shards
    total = 0.0
    for name, size in sent.items():
        near = parallel.ranks <= NODE or (name != "all-reduce" and inside <= NODE)
        rate = link if near else network
        total += size / rate if rate else 0.0
    return total


def memory_change(
    parallel: Parallel | None, parts: dict[str, int], layout: Layout
) -> dict[str, int]:
    """The parts of the peak on each process; of FSDP2 on the first, whose share is the largest.

    DDP keeps the gradients once more, in buckets. FSDP2 keeps a share of parameters, gradients and optimizer state;
    here all parameters are gathered at the peak, which is the most it can be: the penalty of all layers does that.
    """
    if parallel is None:
        return parts
    trained = layout.bytes(1, trained=True)
    if parallel.kind == "ddp":
        return {**parts, "gradients": parts["gradients"] + trained}
    own = layout.bytes(parallel.shards) // parallel.shards
    share = layout.bytes(parallel.shards, trained=True) / parallel.shards / max(1, trained)
    shared = {name: round(parts[name] * share) for name in ("gradients", "optimizer state")}
    return {**parts, **shared, "parameters": parts["parameters"] + own}


def _block_of(model: nn.Module, name: str) -> str:
    """The name of the innermost item of a list of modules around the module ``name``; else of the module around it."""
    around = name.rpartition(".")[0]
    while around:
        above = around.rpartition(".")[0]
        if isinstance(model.get_submodule(above), nn.ModuleList | nn.Sequential):
            return around
        around = above
    return name.rpartition(".")[0]


def _sizes(parameters: Iterable[nn.Parameter], seen: set[int]) -> tuple[Size, ...]:
    found = []
    for p in parameters:
        if id(p) not in seen:
            seen.add(id(p))
            rows = p.shape[0] if p.ndim else 1
            found.append(Size(rows, p.numel() // max(1, rows) * p.itemsize, p.requires_grad))
    return tuple(found)


def _buckets(sizes: list[int]) -> int:
    """DDP's buckets of gradients that come in the reverse order of the parameters."""
    count, filled, limit = 0, 0, _FIRST_BUCKET
    for size in reversed(sizes):
        filled += size
        if filled >= limit:
            count, filled, limit = count + 1, 0, _BUCKET
    return count + (filled > 0)
