"""Whether logits belong to the samples that layers ran on: a part of them would be silently averaged away."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .errors import UnsupportedError, expected


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The batch size of a model's call: the first axis of its first tensor; 0 if there is none."""
    return next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), 0)


def check_batch(
    layer: str, ran_on: Sequence[int], wanted: int, batches: Sequence[int], granularity: str
) -> None:
    """Refuse logits of other samples than ``layer`` ran on.

    Args:
        ran_on: the first axis of what each run of the layer saw.
        wanted: as many samples as the logits have, or of those as many as were drawn.
        batches: of the calls of the whole model that were seen, scaled alike.

    Raises:
        UsageError: the logits are of fewer or more samples.
        UnsupportedError: groups of tokens (windows) instead of samples, with granularity "sample".
    """
    if all(n == wanted for n in ran_on) or sum(ran_on) == wanted:
        return
    grouped = all(n % wanted == 0 for n in ran_on) and (wanted in batches or sum(batches) == wanted)
    if not grouped:
        cure = "pass the model's output as it is; a loss may leave samples out, the penalty cannot"
        seen = " + ".join(map(str, ran_on))
        wish = f"a row for each of the {seen} samples that {layer} ran on"
        raise expected("logits", wish, f"{wanted}", cure)
    if granularity == "sample":
        raise UnsupportedError(
            f"granularity: {layer} runs on {ran_on[0]} groups of tokens of {wanted} samples, so "
            "'sample' is not what it says; use 'token'"
        )
