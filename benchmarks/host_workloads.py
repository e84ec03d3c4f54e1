"""What ``host_time`` measures: every operator and some training steps, ours and PyTorch's own, on a GPU.

Tensors are large, as in training: their size costs the host nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import diversevit_fast as dvf
from benchmarks.orders import BWD, DOUBLE_BWD, FWD
from benchmarks.registry import named
from benchmarks.steps import Loss, erm, penalised, published_loop
from diversevit_fast.models import DiverseViT

Job = Callable[[], object]
NO_GRAD = "fwd, no grad"
ORDERS = (NO_GRAD, FWD, BWD, DOUBLE_BWD)


class Rivals(NamedTuple):
    """A row: the same work done by this library and by PyTorch alone."""

    ours: Job
    baseline: Job
    against: str  # what the baseline is


def operator_rivals(tiny: bool = False) -> dict[tuple[str, str], Rivals]:
    """Return operator and order -> who does it, in bfloat16."""
    B, N, H, d = (2, 7, 2, 16) if tiny else (64, 197, 12, 64)
    D = H * d

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = (draw(B, N, H, d).detach().transpose(1, 2).requires_grad_() for _ in range(3))
    packed, w, b = draw(B, N, 3, H, d), draw(D), draw(D)
    routed = named("routed_head_penalty", "ours").function
    fused, math = (
        named("attention", "SDPA fused").function,
        named("attention", "SDPA math").function,
    )
    rows: dict[tuple[str, str], Rivals] = {}

    def add(
        operator: str,
        inputs: Sequence[Tensor],
        ours: Callable[..., Tensor],
        baseline: Callable[..., Tensor],
        against: str,
        orders: Sequence[str] = ORDERS,
    ) -> None:
        with torch.no_grad():
            do = torch.empty_like(baseline(*inputs)).requires_grad_()
        for order in orders:
            mine, theirs = (_job(f, inputs, do, order) for f in (ours, baseline))
            rows[operator, order] = Rivals(mine, theirs, against)

    add("gelu", [draw(B, N, 4 * D)], dvf.gelu, F.gelu, "F.gelu")
    add(
        *("layer_norm", [draw(B, N, D), w, b], lambda x, w, b: dvf.layer_norm(x, D, w, b)),
        *(lambda x, w, b: F.layer_norm(x, (D,), w, b), "F.layer_norm"),
    )
    first, second = ORDERS[:3], ORDERS[3:]
    add("attention", [q, k, v], dvf.attention, fused, "fused SDPA", first)
    add("attention", [q, k, v], dvf.attention, math, "SDPA math", second)
    for orders, sdpa, name in ((first, fused, "fused SDPA"), (second, math, "SDPA math")):

        def unpacked(qkv: Tensor, sdpa: Callable[..., Tensor] = sdpa) -> Tensor:
            return sdpa(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)

        add("attention_qkvpacked", [packed], dvf.attention_qkvpacked, unpacked, name, orders)
    penalty = named("head_penalty", "ours").function, named("head_penalty", "eager").function
    add("head_penalty", [draw(B, H, N, D)], *penalty, "eager")
    eager = named("routed_head_penalty", "eager").function
    add("routed_head_penalty", [packed, draw(3, H, d, D)], routed, eager, "eager")
    return rows


def _job(f: Callable[..., Tensor], inputs: Sequence[Tensor], do: Tensor, order: str) -> Job:
    plain, cotangent = [x.detach() for x in inputs], do.detach()
    if order == NO_GRAD:
        return lambda: f(*plain)
    if order == FWD:
        return lambda: f(*inputs)
    if order == BWD:
        return lambda: torch.autograd.grad(f(*inputs), inputs, cotangent)
    dd = [torch.empty_like(x) for x in inputs]

    def twice() -> object:
        grads = torch.autograd.grad(f(*inputs), inputs, do, create_graph=True)
        # a linear operator's gradient does not hang together with its input
        return torch.autograd.grad(grads, [*inputs, do], dd, allow_unused=True)

    return twice


class Model(NamedTuple):
    """A model whose steps are measured, and how many images a batch has."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    size: tuple[int, int]


def timm_of_the_paper(depth: int | None = None) -> nn.Module:
    """A stock timm ViT of the paper's sizes."""
    from timm.models.vision_transformer import VisionTransformer

    config = DiverseViT().config
    return VisionTransformer(
        img_size=tuple(config["image_size"]),
        patch_size=config["patch_size"],
        embed_dim=config["dim"],
        depth=depth or config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_dim"] / config["dim"],
        num_classes=2,
    )


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=2, **options)

    return make


PAPER = Model("timm ViT of the paper's sizes", timm_of_the_paper, 80, (64, 32))
VIT_S = Model("ViT-S", timm_model("vit_small_patch16_224"), 64, (224, 224))

ERM, LOOP = "stock ERM", "published loop"
LAST, ALL = "ours, last layer", "ours, all layers"
STEPS: dict[str, tuple[Model, tuple[str, ...]]] = {
    "paper": (PAPER, (ERM, LOOP, LAST, ALL)),
    "ViT-S": (VIT_S, (ERM, LAST, ALL)),
}
"""Name -> model, and who does its training step. Ratios are to the first."""


def step_jobs(name: str) -> dict[str, Job]:
    """Return implementation -> one step: zero the gradients, loss, backward. The model is one and the same."""
    spec, who = STEPS[name]
    torch.manual_seed(0)
    model = spec.make().to(
        "cuda"
    )  # made on the CPU: CUDA compiles some initialisers, and there is no compiler
    images = torch.rand(spec.batch, 3, *spec.size, device="cuda")
    labels = torch.arange(spec.batch, device="cuda") % 2
    return {one: step_job(one, model, images, labels) for one in who}


def step_job(who: str, model: nn.Module, images: Tensor, labels: Tensor) -> Job:
    """Return one training step as ``who`` does it; ``HeadDiversity`` is built here, once."""
    loss = loss_of(who, model)

    def step() -> None:
        model.zero_grad()
        loss(images, labels).backward()

    return step


def loss_of(who: str, model: nn.Module) -> Loss:
    """Return the loss of a step, from images and labels."""
    if who == LOOP:
        loop = published_loop(model)

        def by_products(images: Tensor, labels: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # the one of PyTorch's that has a double backward
                return loop(images, labels)

        return by_products
    return {ERM: erm, LAST: penalised("last"), ALL: penalised("all")}[who](model)
