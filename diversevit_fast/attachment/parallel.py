"""Make data parallelism work with a gradient taken inside the step, or refuse what cannot.

Measured with torch 2.14: DDP is right with one backward pass of the whole loss, but not with
``static_graph``; FSDP2 frees parameters after the inner backward pass unless told not to; FSDP1
has no such switch.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .._torch_internals import fsdp_modules, is_fsdp_root, reshards_after_backward, running_ddp
from ..errors import UnsupportedError


def unwrap(model: Any) -> Any:
    """Return the module inside DistributedDataParallel, or ``model`` itself.

    Raises:
        UnsupportedError: DDP with ``static_graph``, FSDP1 or DataParallel.
    """
    if is_ddp(model):
        _refuse_static_graph(model)
        model = model.module
    if isinstance(model, nn.DataParallel):
        raise UnsupportedError(
            "model: DataParallel runs copies on other threads, which cannot be attached to; use "
            "DistributedDataParallel"
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, fsdp.FullyShardedDataParallel):
                raise UnsupportedError(
                    "model: FullyShardedDataParallel (FSDP1) frees parameters that the second derivative "
                    "needs; use torch.distributed.fsdp.fully_shard (FSDP2)"
                )
    return model


def is_ddp(model: Any) -> bool:
    """True if ``model`` is wrapped in DistributedDataParallel."""
    return isinstance(model, nn.parallel.DistributedDataParallel)


def check_ddp_forward(wrapped: bool) -> None:
    """Refuse a forward after which the ranks would diverge.

    Args:
        wrapped: the model was passed inside DDP, so it must be running inside DDP's forward.

    Raises:
        UnsupportedError: DDP runs with ``static_graph``, or the module inside was called past it.
    """
    running = running_ddp()
    if running is not None:
        _refuse_static_graph(running)
    elif wrapped:
        raise UnsupportedError(
            "model: the module inside DDP was called past it, so gradients would not be averaged over "
            "ranks; call the DDP model, or give HeadDiversity its .module"
        )


def _refuse_static_graph(model: Any) -> None:
    if model.static_graph:
        raise UnsupportedError(
            "model: DDP(static_graph=True) drops gradients where a gradient is taken inside the step, "
            "and ranks diverge; use static_graph=False"
        )


@contextmanager
def keep_unsharded(model: nn.Module) -> Iterator[None]:
    """Keep a backward pass inside the block from freeing the parameters that FSDP2 gathered."""
    sharded = [(module, reshards_after_backward(module)) for module in fsdp_modules(model)]
    roots = [module for module, _ in sharded if is_fsdp_root(module)]
    if len(roots) > 1:
        raise UnsupportedError(
            f"model: {len(roots)} of its modules are sharded and nothing above them is, which FSDP2 takes "
            "for models of their own; call fully_shard(model) last"
        )
    for module, _ in sharded:
        module.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for module, before in sharded:
            module.set_reshard_after_backward(before, recurse=False)
