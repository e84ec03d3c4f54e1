"""Training steps as groups of benchmark rows: the paper's setting, and every layer of a small ViT.

A job is loss and backward, under autocast where bfloat16 is asked for; parameters stay put, so every round does the
same. The gate compares loss and gradient with PyTorch's own operators in float64.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diversevit_fast as dvf
from benchmarks.registry import Job, Provider
from benchmarks.scripts.paper_step import FusedStock, Stock, published_penalty
from diversevit_fast.models import DiverseViT

Loss = Callable[[Any, Tensor, Tensor], Tensor]
WEIGHT = 100
"""Of the penalty, as published."""


class StepSpec(NamedTuple):
    """What a group of steps compares."""

    stage: str  # "paper step" or "all-layers step"
    batch: int
    tiny: bool
    device: str
    order: str = "d0+d1+d2"
    dtype: torch.dtype = torch.float32
    graph: bool = False  # whether the step is captured once as a CUDA graph, and replayed

    @property
    def group(self) -> str:
        model = f" {self.vit}" if self.stage == "all-layers step" else ""
        kind = str(self.dtype).removeprefix("torch.")
        how = " CUDA graph" if self.graph else ""
        return f"{self.stage}{model} batch {self.batch} {kind}{how}"

    @property
    def vit(self) -> str:
        """Of every layer's step: the least, and in bfloat16 the next."""
        return "ViT-S" if self.dtype == torch.bfloat16 else "ViT-Ti"


def _erm(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def _stock(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with FusedStock():
        return _erm(model, images, labels)


def _ours(layers: str) -> Loss:
    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        diversity = dvf.HeadDiversity(model, layers=layers)
        with diversity:
            logits = model(images)
        return F.cross_entropy(logits, labels) + WEIGHT * diversity.penalty(logits)

    return loss


def _loop(model: DiverseViT, images: Tensor, labels: Tensor) -> Tensor:
    with torch.device(images.device):  # its masks
        logits, penalty = published_penalty(model, images)
    return F.cross_entropy(logits, labels) + WEIGHT * penalty


def _eager_everywhere(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with Stock():
        return _ours("all")(model, images, labels)


STEPS: dict[str, dict[str, tuple[Loss, Loss]]] = {
    "paper step": {
        "ours": (_ours("last"), _loop),
        "erm": (_erm, _stock),
        "stock erm": (_stock, _stock),
        "published loop": (_loop, _loop),
    },
    "all-layers step": {
        "ours": (_ours("all"), _eager_everywhere),
        "erm": (_erm, _erm),
        "eager": (_eager_everywhere, _eager_everywhere),
    },
}
"""Step -> provider -> its loss, and the one of PyTorch alone that judges it, in float64."""


def step_providers(stage: str) -> list[Provider]:
    return [Provider(name, lambda: torch.empty(0)) for name in STEPS[stage]]


class StepWorkload:
    """Model, images and labels of a ``StepSpec``; jobs of providers; what they must return."""

    def __init__(self, spec: StepSpec):
        self.spec = spec
        torch.manual_seed(0)
        self.model, size = _model(spec)
        self.model.to(spec.device)
        self.images = torch.rand(spec.batch, 3, *size, device=spec.device)
        self.labels = torch.arange(spec.batch, device=spec.device) % 2
        self._judged: dict[Loss, tuple[tuple[Tensor, ...], list[float]]] = {}

    @property
    def like(self) -> Tensor:
        return self.images

    def job(self, provider: Provider) -> Job:
        loss = STEPS[self.spec.stage][provider.name][0]
        return captured(lambda: self._run(loss)) if self.spec.graph else lambda: self._run(loss)

    def _run(self, loss: Loss) -> tuple[Tensor, ...]:
        half = self.spec.dtype == torch.bfloat16
        with torch.autocast(self.spec.device, torch.bfloat16, enabled=half):
            return _step(loss, self.model, self.images, self.labels)

    @cached_property
    def _double(self) -> nn.Module:
        return copy.deepcopy(self.model).double()

    def check_of(self, provider: Provider) -> Callable[[tuple[Tensor, ...]], None]:
        """The gate of one provider: loss and gradient within 0.1 % of its judge in float64.

        In bfloat16 besides twice as far off as the judge is in that.
        """

        def check(results: tuple[Tensor, ...]) -> None:
            judge = STEPS[self.spec.stage][provider.name][1]
            if judge not in self._judged:
                self._judged[judge] = self._judge(judge)
            exact, budgets = self._judged[judge]
            for error, budget in zip(_errors(results, exact), budgets, strict=True):
                assert error <= budget, f"{provider.name}: {error:.1e} off its float64 judge"

        return check

    def _judge(self, judge: Loss) -> tuple[tuple[Tensor, ...], list[float]]:
        """Its results in float64, and how far off these one may be."""
        exact = _step(judge, self._double, self.images.double(), self.labels)
        half = self.spec.dtype == torch.bfloat16
        rounding = _errors(self._run(judge), exact) if half else [0.0] * len(exact)
        return exact, [1e-3 + 2 * own for own in rounding]


def captured(job: Job) -> Job:
    """``job`` as a CUDA graph: its launches without what Python does between them. Results are overwritten."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and libraries set up before a capture
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = job()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def _errors(results: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Relative, of each."""
    pairs = zip(results, exact, strict=True)
    return [float((got.double() - right).norm() / right.norm()) for got, right in pairs]


def _model(spec: StepSpec) -> tuple[nn.Module, tuple[int, int]]:
    if spec.stage == "paper step":
        small = {"dim": 32, "depth": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
        return DiverseViT(**(small if spec.tiny else {})), (64, 32)  # pyright: ignore[reportArgumentType]
    side = 32 if spec.tiny else 224
    import timm

    options: dict[str, Any] = {"depth": 2} if spec.tiny else {}
    name = {"ViT-S": "vit_small_patch16_224", "ViT-Ti": "vit_tiny_patch16_224"}[spec.vit]
    return timm.create_model(name, img_size=side, num_classes=2, **options), (side, side)


def _step(loss: Loss, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The loss, and the gradient of all parameters as one vector."""
    model.zero_grad()
    value = loss(model, images, labels)
    value.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(grads)
