"""What an error inside a capture means: which line waits for the GPU."""

import inspect
import traceback
from pathlib import Path

import torch

from ..errors import UnsupportedError
from .cuda_graphs import is_wait

_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)


def refusal_of_wait(
    error: BaseException, optimizer: torch.optim.Optimizer
) -> UnsupportedError | None:
    """The error for a step that waits for the GPU, with the line that does; None for any other error."""
    if isinstance(error, UnsupportedError) or not is_wait(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    step = inspect.unwrap(type(optimizer).step).__code__
    if any(frame.f_code is step for frame, _ in traceback.walk_tb(error.__traceback__)):
        name = type(optimizer).__name__
        return UnsupportedError(
            f"optimizer: {name} waits for the GPU, which a CUDA graph cannot; make it with fused=True, or use AdamW"
        )
    own = [f for f in frames if not f.filename.startswith((_OURS, _TORCH))]
    if own:
        source = f" `{own[-1].line}`" if own[-1].line else ""
        where = f"{own[-1].filename}:{own[-1].lineno}{source}"
        return UnsupportedError(
            f"loss: {where} waits for the GPU, which a CUDA graph cannot; return the tensor, and read it after the step"
        )
    return UnsupportedError(
        f"loss: the step cannot be captured as a CUDA graph; look for what waits for the GPU: {_first_line(error)}"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
