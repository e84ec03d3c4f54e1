"""Training steps to measure: the paper's setting, a penalty on every layer of a small ViT, and R1 of critics.

A job is loss and backward, under autocast for bfloat16. Parameters are not updated, so every round computes the same.
The correctness check compares loss and gradient with PyTorch's own operators in float64.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diversevit_fast as dvf
from benchmarks.baselines import Stock, TwiceDifferentiableStock, published_penalty
from benchmarks.critics import ATTENTION, CRITICS, r1
from benchmarks.gpu_timing import captured
from benchmarks.orders import DOUBLE_BWD
from benchmarks.registry import Implementation, Job
from diversevit_fast.models import DiverseViT

Loss = Callable[[Tensor, Tensor], Tensor]
"""Computes a step's loss from images and labels."""
LossOf = Callable[[Any], Loss]
"""Makes the loss for a model, once."""
WEIGHT = 100
"""The penalty's weight in the loss, as published."""


class StepSpec(NamedTuple):
    """One group of rows: a training step at a batch size and dtype."""

    step: str  # "paper step", "all-layers step" or "R1 step"
    batch: int
    tiny: bool
    device: str
    order: str = DOUBLE_BWD
    dtype: torch.dtype = torch.float32
    graph: bool = False  # whether the step is captured once as a CUDA graph, and replayed
    critic: str = ""  # of the R1 step, by its name in ``CRITICS``

    @property
    def workload(self) -> str:
        return self.step

    @property
    def group(self) -> str:
        model = f" {self.vit}" if self.step == "all-layers step" else f" {self.critic}".rstrip()
        kind = str(self.dtype).removeprefix("torch.")
        how = " CUDA graph" if self.graph else ""
        return f"{self.step}{model} batch {self.batch} {kind}{how}"

    @property
    def vit(self) -> str:
        """Name of the model of the step on all layers: the smallest, and in bfloat16 the next."""
        return "ViT-S" if self.dtype == torch.bfloat16 else "ViT-Ti"


def erm(model: nn.Module) -> Loss:
    return lambda images, labels: F.cross_entropy(model(images), labels)


def _stock_erm(model: nn.Module) -> Loss:
    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with Stock():
            return F.cross_entropy(model(images), labels)

    return loss


def penalised(layers: str) -> LossOf:
    def loss_of(model: nn.Module) -> Loss:
        diversity = dvf.HeadDiversity(model, layers=layers)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            with diversity:
                logits = model(images)
            return F.cross_entropy(logits, labels) + WEIGHT * diversity.penalty(logits)

        return loss

    return loss_of


def published_loop(model: nn.Module) -> Loss:
    def loss(images: Tensor, labels: Tensor) -> Tensor:
        logits, penalty = published_penalty(model, images)
        return F.cross_entropy(logits, labels) + WEIGHT * penalty

    return loss


def _eager_on_all_layers(model: nn.Module) -> Loss:
    ours = penalised("all")(model)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with TwiceDifferentiableStock():
            return ours(images, labels)

    return loss


STEPS: dict[str, dict[str, tuple[LossOf, LossOf]]] = {
    "paper step": {
        "ours": (penalised("last"), published_loop),
        "erm": (erm, _stock_erm),
        "stock erm": (_stock_erm, _stock_erm),
        "published loop": (published_loop, published_loop),
    },
    "all-layers step": {
        "ours": (penalised("all"), _eager_on_all_layers),
        "erm": (erm, erm),
        "eager": (_eager_on_all_layers, _eager_on_all_layers),
    },
    "R1 step": {
        name: (r1(name), r1("eager" if name == "eager" else "SDPA math")) for name in ATTENTION
    },
}
"""Step -> implementation -> its loss, and its reference: the loss by PyTorch alone, taken in float64."""


def step_implementations(step: str) -> list[Implementation]:
    return [Implementation(name, lambda: torch.empty(0)) for name in STEPS[step]]


class StepWorkload:
    """Model, images and labels of a ``StepSpec``, jobs of implementations, and the check of their results."""

    def __init__(self, spec: StepSpec):
        self.spec = spec
        torch.manual_seed(0)
        self.model, size = _model(spec)
        self.model.to(spec.device)
        self.images = torch.rand(spec.batch, 3, *size, device=spec.device)
        self.labels = torch.arange(spec.batch, device=spec.device) % 2
        self._references: dict[LossOf, tuple[tuple[Tensor, ...], list[float]]] = {}

    @property
    def like(self) -> Tensor:
        return self.images

    def job(self, implementation: Implementation) -> Job:
        loss = STEPS[self.spec.step][implementation.name][0](self.model)
        return captured(lambda: self._run(loss)) if self.spec.graph else lambda: self._run(loss)

    def _run(self, loss: Loss) -> tuple[Tensor, ...]:
        half = self.spec.dtype == torch.bfloat16
        with torch.autocast(self.spec.device, torch.bfloat16, enabled=half):
            return _step(loss, self.model, self.images, self.labels)

    @cached_property
    def _double(self) -> nn.Module:
        return copy.deepcopy(self.model).double()

    def check(self, implementation: Implementation, results: tuple[Tensor, ...]) -> None:
        """Compare loss and gradient with the implementation's reference: they may differ by 0.1 %.

        In bfloat16 by its rounding, 0.4 %, and twice the reference's own error in that dtype.

        Raises:
            AssertionError: a result is not finite, or wrong.
        """
        loss_of = STEPS[self.spec.step][implementation.name][1]
        if loss_of not in self._references:
            self._references[loss_of] = self._reference(loss_of)
        exact, budgets = self._references[loss_of]
        for error, budget in zip(relative_errors(results, exact), budgets, strict=True):
            assert error <= budget, f"{implementation.name}: {error:.1e} off its reference"

    def _reference(self, loss_of: LossOf) -> tuple[tuple[Tensor, ...], list[float]]:
        """Results in float64, and the relative error allowed of each."""
        exact = _step(loss_of(self._double), self._double, self.images.double(), self.labels)
        half = self.spec.dtype == torch.bfloat16
        rounding = (
            relative_errors(self._run(loss_of(self.model)), exact) if half else [0.0] * len(exact)
        )
        floor = torch.finfo(torch.bfloat16).eps / 2 if half else 1e-3
        return exact, [floor + 2 * own for own in rounding]


def relative_errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Return the relative error of each result."""
    pairs = zip(results, exact, strict=True)
    return [float((got.double() - right).norm() / right.norm()) for got, right in pairs]


def _model(spec: StepSpec) -> tuple[nn.Module, tuple[int, int]]:
    if spec.step == "paper step":
        small = {"dim": 32, "depth": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
        return DiverseViT(**(small if spec.tiny else {})), (64, 32)  # pyright: ignore[reportArgumentType]
    if spec.critic:
        critic = CRITICS[spec.critic]
        depth, side = (2, 32) if spec.tiny else (critic.depth, critic.side)
        return critic.make(depth, side), (side, side)
    side = 32 if spec.tiny else 224
    import timm

    options: dict[str, Any] = {"depth": 2} if spec.tiny else {}
    name = {"ViT-S": "vit_small_patch16_224", "ViT-Ti": "vit_tiny_patch16_224"}[spec.vit]
    return timm.create_model(name, img_size=side, num_classes=2, **options), (side, side)


def _step(loss: Loss, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return the loss, and the gradient of all parameters as one vector."""
    model.zero_grad()
    value = loss(images, labels)
    value.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(grads)
