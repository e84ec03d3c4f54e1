"""Data parallelism: what DDP and FSDP2 send, and what they do to memory."""

import re
import reprlib
from typing import NamedTuple

from ..errors import usage_error

MOST_RANKS = 1 << 20
NODE = 8
"""GPUs of a node, whose links are faster than the network."""


class Parallel(NamedTuple):
    """``kind`` is ``"ddp"`` or ``"fsdp2"``; ``ranks`` GPUs, each with the batch."""

    kind: str
    ranks: int


def parallel_of(parallel: object) -> Parallel | None:
    """What ``"ddp:8"`` or ``"fsdp2:16"`` says; None for one process.

    Raises:
        UsageError: it says something else.
    """
    if parallel is None:
        return None
    found = re.fullmatch(r"(ddp|fsdp2):(\d{1,7})", parallel) if isinstance(parallel, str) else None
    if found is None or not 1 <= int(found[2]) <= MOST_RANKS:
        wanted = "ddp:N or fsdp2:N for N processes"
        raise usage_error("parallel", wanted, reprlib.repr(parallel), "say ddp:8")
    return Parallel(found[1], int(found[2]))


def sent_bytes(parallel: Parallel | None, parameters: int, trained: int) -> dict[str, float]:
    """Bytes that each process sends in a step, by collective operation, in rings.

    DDP reduces all gradients to everybody. FSDP2 gathers parameters for the forward and for the first backward pass
    that needs them, and scatters gradients; the penalty's backward pass leaves what it gathered for the last one.
    """
    if parallel is None:
        return {}
    others = 1 - 1 / parallel.ranks
    if parallel.kind == "ddp":
        return {"all-reduce": 2 * others * trained}
    return {"all-gather": 2 * others * parameters, "reduce-scatter": others * trained}


def memory_change(parallel: Parallel | None, parts: dict[str, int], trained: int) -> dict[str, int]:
    """The parts of the peak on each process.

    DDP keeps the gradients once more, in buckets. FSDP2 keeps a share of parameters, gradients and optimizer state;
    here all parameters are gathered at the peak, which is the most it can be: the penalty of all layers does that.
    """
    if parallel is None:
        return parts
    if parallel.kind == "ddp":
        return {**parts, "gradients": parts["gradients"] + trained}
    shared = {name: -(-parts[name] // parallel.ranks) for name in ("gradients", "optimizer state")}
    own = -(-parts["parameters"] // parallel.ranks)
    return {**parts, **shared, "parameters": parts["parameters"] + own}
