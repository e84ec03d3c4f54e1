"""Run a loader through a model once, with the predictions of many choices of heads."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attachment.attention_modules import AttentionLayer
from ..errors import usage_error
from .candidates import Kept
from .loader_batches import Batch, split_batch
from .prefix_cache import PrefixCache
from .scores import Predictions

Answers = Callable[[str, Batch], tuple[Tensor | None, Tensor | list[str] | None]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: put a model and its modules into evaluation mode, and back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Runner:
    """Computes the predictions of candidates, all of them in one run of a loader.

    Candidates come in groups. Within a group, what precedes the first layer in which they differ is
    computed once per batch.

    Args:
        model: a classifier (``dvf.select_heads``).
        layers: those of its attention layers that candidates may name.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer]):
        self._model = model
        self._cache = PrefixCache(model, layers)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context manager: as the function of this name, with the prefix cache open."""
        with evaluating(self._model), self._cache:
            yield

    def predictions(
        self,
        name: str,
        loader: Any,
        groups: Sequence[Sequence[Kept]],
        answers: Answers,
    ) -> Iterator[tuple[int, int, Predictions]]:
        """Yield group, place in the group and predictions, of every candidate for every batch.

        Args:
            name: what error messages call the loader.
            answers: takes ``name`` and a batch, returns its labels and groups, checked.

        Raises:
            UsageError: no batches or none of the expected form, logits that are not finite or not one
                row per image, labels out of range.
        """
        if not isinstance(loader, Iterable) or isinstance(loader, (Tensor, str, Mapping)):
            got = type(loader).__name__
            raise usage_error(name, "an iterable of batches", got, "pass a list or a DataLoader")
        seen = 0
        for item in loader:
            batch = split_batch(name, item, self._model, self._device)
            labels, members = answers(name, batch)
            seen += batch.size
            for i, group in enumerate(groups):
                outputs = self._cache.outputs(group, *batch.args, **batch.kwargs)
                for j, output in enumerate(outputs):
                    predictions = Predictions(_logits(output), labels, members)
                    _check(predictions)
                    yield i, j, predictions
        if not seen:
            raise usage_error(name, "at least one batch", "none", "pass a list or a DataLoader")


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise usage_error(
            "model", "logits [B, classes]", got, "wrap the model in one that returns them"
        )
    return logits.float().cpu()


def _check(batch: Predictions) -> None:
    (count, classes), labels = batch.logits.shape, batch.labels
    if not torch.isfinite(batch.logits).all():
        raise usage_error("model", "finite logits", "NaN or infinity", "check the weights")
    if labels is not None and len(labels) != count:
        raise usage_error(
            "model", f"logits of {len(labels)} images", count, "give one row an image"
        )
    if labels is not None and count and not 0 <= labels.min() <= labels.max() < classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise usage_error("labels", f"class indices from 0 to {classes - 1}", got, "check the data")
