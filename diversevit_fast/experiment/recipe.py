"""Optimizer, precision and augmentation of a training, as its settings ask for."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Settings

OPTIMIZER_NAMES = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD with momentum 0.9"}
_MOMENTUM = 0.9
_SHIFT = 8  # a crop moves an image by at most this part of its side
_DRAWS = 2**31  # apart from the seeds that order batches, which are smaller for seeds below 2000


def make_optimizer(model: nn.Module, settings: Settings, method: str) -> torch.optim.Optimizer:
    """Return the optimizer that trains ``model`` by ``method``."""
    options: dict[str, Any] = {
        "lr": settings.base_lr(method),
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=_MOMENTUM, **options)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **options)


def moments(model: nn.Module, settings: Settings) -> dict[int, dict[str, Tensor]]:
    """Return an example of the optimizer's state of each parameter after a step."""

    def of(p: Tensor) -> dict[str, Tensor]:
        if settings.optimizer == "sgd":
            return {"momentum_buffer": p.detach()}
        return {"step": torch.zeros(()), "exp_avg": p.detach(), "exp_avg_sq": p.detach()}

    return {i: of(p) for i, p in enumerate(model.parameters())}


def amp_dtype(settings: Settings) -> torch.dtype | None:
    """Return the dtype that training steps are cast to, or None."""
    return torch.bfloat16 if settings.amp == "bf16" else None


def autocast(settings: Settings, device: torch.device) -> Any:
    """Return the context of a training step's forward."""
    dtype = amp_dtype(settings)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Augmentation:
    """Random flips and crops of training images; what is drawn follows from seed and epoch.

    Args:
        kinds: of ``"flip"`` (left to right, half of the images) and ``"crop"`` (moved by up to an eighth of
            height and width, the border mirrored).
        order: the generator that orders the epoch's batches.
    """

    def __init__(self, kinds: tuple[str, ...], order: torch.Generator):
        self._kinds = kinds
        seed = (order.initial_seed() + _DRAWS) % 2**63
        self._draws = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> Tensor:
        """Return changed copies of ``images``, float ``[B, C, height, width]`` on the CPU."""
        if "flip" in self._kinds:
            flipped = torch.rand(len(images), generator=self._draws) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        if "crop" in self._kinds:
            images = self._cropped(images)
        return images

    def _cropped(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        down, right = height // _SHIFT, width // _SHIFT
        padded = F.pad(images, (right, right, down, down), mode="reflect")
        tops = torch.randint(2 * down + 1, (count, 1), generator=self._draws)
        lefts = torch.randint(2 * right + 1, (count, 1), generator=self._draws)
        rows = (tops + torch.arange(height))[:, None, :, None]
        columns = (lefts + torch.arange(width))[:, None, None, :]
        samples, channels = torch.arange(count), torch.arange(images.shape[1])
        return padded[samples[:, None, None, None], channels[:, None, None], rows, columns]
