"""Checks that the logits passed to ``penalty()`` belong to the batch that the model ran on.

Otherwise the penalty would silently average over the wrong samples.
"""

from collections.abc import Container, Sequence

from torch import Tensor

from ..attachment.attention_modules import AttentionLayer
from ..errors import UnsupportedError, usage_error
from .captured import Captured


def check_reached(layers: Sequence[AttentionLayer], reached: Container[int]) -> None:
    """Refuse logits that do not depend on a run of each layer.

    Args:
        reached: the indices of the layers that they depend on.

    Raises:
        UsageError: a layer is not among them.
    """
    missing = [layer.name for layer in layers if layer.index not in reached]
    if missing:
        raise usage_error(
            "logits",
            "logits computed under this context",
            f"logits that do not depend on {', '.join(missing)}",
            "pass the output of the forward run inside the last `with` block",
        )


def check_batches(
    layers: Sequence[AttentionLayer],
    runs: Sequence[Captured],
    batches: Sequence[int],
    count: int,
    samples: Tensor | None,
    granularity: str,
) -> None:
    """Refuse logits of other samples than the layers ran on; needs no gradient.

    Args:
        runs: those that the logits depend on.
        batches: the batch size of each forward of the whole model.
        count: the number of samples of the logits.
        samples: the indices of those that have the penalty; None if all have it.

    Raises:
        UsageError, UnsupportedError: as ``_check_batch``.
    """
    drawn = count if samples is None else len(samples)
    scaled = [n * drawn // count for n in batches]
    for layer in layers:
        ran_on = [run.samples for run in runs if run.layer == layer.index]
        _check_batch(layer.name, ran_on, drawn, scaled, granularity)


def _check_batch(
    layer: str, ran_on: Sequence[int], wanted: int, batches: Sequence[int], granularity: str
) -> None:
    """Refuse logits of fewer or more samples than ``layer`` ran on.

    Args:
        ran_on: the number of samples, or windows, in each run of the layer.
        wanted: the number of samples of the logits that have the penalty.
        batches: the number of these in each forward of the whole model.

    Raises:
        UsageError: the logits have another number of samples.
        UnsupportedError: groups of tokens (windows) instead of samples, with granularity "sample".
    """
    if all(n == wanted for n in ran_on) or sum(ran_on) == wanted:
        return
    grouped = all(n % wanted == 0 for n in ran_on) and (wanted in batches or sum(batches) == wanted)
    if not grouped:
        hint = "pass the model's output as it is; a loss may leave samples out, the penalty cannot"
        seen = " + ".join(map(str, ran_on))
        wish = f"a row for each of the {seen} samples that {layer} ran on"
        raise usage_error("logits", wish, f"{wanted}", hint)
    if granularity == "sample":
        raise UnsupportedError(
            f"granularity: {layer} runs on {ran_on[0]} groups of tokens of {wanted} samples, so "
            "'sample' is not what it says; use 'token'"
        )
