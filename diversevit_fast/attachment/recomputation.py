"""Activation checkpointing inside contexts: what a backward pass recomputes is recomputed inside them too.

A non-reentrant checkpoint runs its function again when gradients are taken, when the blocks around it may be over, and
on a GPU on another thread. What it then saves for backward has to be what it saved first, so the function is run
inside a copy of every block that was open, in the state in which it was when the checkpoint began. Copies call the
same operators and keep nothing. Blocks that are open where gradients are taken see nothing of it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from .._torch_internals import checkpoint_frame, checkpoint_frames, in_reentrant_checkpoint
from ..errors import UnsupportedError
from .attention_modules import AttentionLayer
from .torch_calls import open_attachments, paused


class Moment(NamedTuple):
    """What a block is doing when a checkpoint begins."""

    started: bool  # whether it sees calls
    running: AttentionLayer | None
    attention_called: bool
    begun: bool = False  # whether a tensor was captured
    class_token_only: bool = False  # whether the class-token shortcut is being taken
    left_out: Any = None  # blocks whose checkpoints keep their own graph


def recompute_inside() -> None:
    """Let the non-reentrant checkpoints that run here recompute inside copies of the open blocks.

    To be called before a block does the first thing in a checkpoint. What the innermost has not seen, those around
    it have not either.
    """
    innermost = None if torch.compiler.is_compiling() else checkpoint_frame()
    if innermost is None or _is_inside(innermost):
        return
    copies: list[Callable[[], Any]] = [block.recomputation() for block in open_attachments()]
    for frame in checkpoint_frames():
        if not _is_inside(frame):
            frame.recompute_fn = _inside(copies, frame.recompute_fn)


def _is_inside(frame: Any) -> bool:
    return hasattr(frame.recompute_fn, "inside")


def _inside(copies: list[Callable[[], Any]], recompute: Callable[..., Any]) -> Callable[..., Any]:
    """``recompute`` inside copies of blocks, while those that are open are paused."""

    def inside(*args: Any) -> Any:
        with paused(), ExitStack() as stack:
            for copy in copies:
                stack.enter_context(copy())
            return recompute(*args)

    inside.inside = True  # pyright: ignore[reportFunctionMemberAccess]
    return inside


def copies_of(make: Callable[[], Any], pool: list[Any]) -> Callable[[Any], Any]:
    """A function that enters an idle block of ``pool``, or a new one, in the state that it is given.

    Nothing of it leads to the block that is copied, whose captured tensors lead to the checkpoint: a cycle through
    autograd's graph would never be freed.
    """

    @contextmanager
    def entered(moment: Any) -> Iterator[Any]:
        block = pool.pop() if pool else make()
        block.resume(moment)
        try:
            with block:
                yield block
        finally:
            block.forget()
            pool.append(block)

    return entered


def refuse_reentrant_checkpointing() -> None:
    """Refuse a call that a reentrant checkpoint runs: its backward pass drops second derivatives.

    Raises:
        UnsupportedError: one runs here.
    """
    if in_reentrant_checkpoint():
        raise UnsupportedError(
            "checkpoint: reentrant checkpointing has no second derivative; pass use_reentrant=False"
        )
