"""Make data parallelism work with a gradient taken inside the step, or refuse what cannot.

Measured with torch 2.14: DDP is right with one backward pass of the whole loss, but not with
``static_graph``; FSDP2 frees parameters after the inner backward pass unless told not to; FSDP1
has no such switch.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .._torch_internals import (
    backward_pass,
    fsdp_modules,
    is_fsdp_root,
    is_gathered,
    reshards_after_backward,
    running_ddp,
    will_run,
)
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


def check_ddp_forward(wrapped: bool) -> "OneBackwardPass | None":
    """Refuse a forward after which the ranks would diverge.

    Args:
        wrapped: the model was passed inside DDP, so it must be running inside DDP's forward.

    Returns:
        What refuses a second backward pass, where DDP would not average its gradients.

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
    if running is None or not running.require_backward_grad_sync:
        return None
    several = dist.get_world_size(running.process_group) > 1
    return OneBackwardPass(running.module) if several else None


class OneBackwardPass:
    """Refuses a second backward pass of one forward: DDP has averaged the gradients of the first, and is done.

    Passes that change no parameter's ``grad`` do not count, such as ``autograd.grad`` by the images.

    Args:
        model: the module inside DDP.
    """

    def __init__(self, model: nn.Module):
        self._model, self._seen = model, -1

    def watch(self, *roots: Tensor) -> None:
        """Look at backward passes that come through these tensors.

        Raises:
            UnsupportedError: then, in the second pass.
        """
        for root in roots:
            if root.requires_grad:
                root.register_hook(self._note)

    def _note(self, _: Tensor) -> None:
        now = backward_pass()
        if now == self._seen or not self._is_averaged():
            return
        if self._seen >= 0:
            raise UnsupportedError(
                "penalty: loss and penalty are differentiated in two backward passes, and DDP would not average "
                "the gradients of the second over ranks; add the two and call backward once"
            )
        self._seen = now

    def _is_averaged(self) -> bool:
        """Whether the running backward pass adds to the ``grad`` of a parameter."""
        return any(_adds_to(p) for p in self._model.parameters() if p.requires_grad)


def watch_backward(
    model: nn.Module, one_pass: OneBackwardPass | None, logits: Tensor, penalty: Tensor
) -> None:
    """Have a backward pass of the penalty refused where it would be wrong, or read what is no longer there.

    Args:
        model: what the penalty is of.
        one_pass: of a model inside DDP.
        logits, penalty: on the way of the loss, and the penalty.

    Raises:
        UnsupportedError: in a backward pass: the second under DDP, or FSDP2 has freed parameters before it.
    """
    if one_pass is not None:
        one_pass.watch(logits, penalty)
    gathered = [module for module in fsdp_modules(model) if is_gathered(module)]
    if not gathered or not penalty.requires_grad:
        return

    def check(_: Tensor) -> None:
        if not all(map(is_gathered, gathered)):
            raise UnsupportedError(
                "penalty: another backward pass came first, after which FSDP2 freed parameters that the penalty "
                "reads; add loss and penalty and call backward once, or call set_reshard_after_backward(False)"
            )

    penalty.register_hook(check)


def _adds_to(parameter: nn.Parameter) -> bool:
    try:
        return will_run(get_gradient_edge(parameter).node)
    except RuntimeError:  # autograd.grad was asked for it
        return False


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
