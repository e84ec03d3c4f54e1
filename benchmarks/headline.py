"""Whole training steps on a GPU, the paper's own question: what the penalty costs, whose step, how large a batch fits.

A step is everything between a batch and the updated weights: zeroed gradients, loss, backward, AdamW. ``HeadDiversity``
is made once per model, as users do. Before a step is timed, loss and gradient of one step on two images are compared
with those of PyTorch's own operators in float64.
"""

import copy
import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

import diversevit_fast as dvf
from benchmarks.baselines import TwiceDifferentiableStock, plain_modules
from benchmarks.gpu_timing import event_seconds, host_seconds
from benchmarks.orders import DOUBLE_BWD
from benchmarks.records import rounded
from benchmarks.steps import Loss, LossOf, erm, penalised, published_loop, relative_errors
from diversevit_fast.models import DiverseViT

LAYERS = ("last", "all")
CHECKED_BATCH = 2
DEVICE = "cuda"
Step = Callable[[], Tensor]
"""Takes one step on a batch that it holds; returns the loss."""


class Model(NamedTuple):
    """A model, the batch at which its steps are timed, and the dtype of autocast, or float32 for none."""

    timm: str | None  # None: the paper's own
    batch: int
    dtype: torch.dtype


MODELS = {
    "DiverseViT": Model(None, 80, torch.float32),
    "ViT-S": Model("vit_small_patch16_224", 64, torch.bfloat16),
    "ViT-B": Model("vit_base_patch16_224", 64, torch.bfloat16),
    "ViT-L": Model("vit_large_patch16_224", 32, torch.bfloat16),
}


def stock_erm(model: nn.Module) -> Loss:
    plain = erm(model)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with plain_modules() if isinstance(model, DiverseViT) else nullcontext():
            return plain(images, labels)

    return loss


def eager(layers: str) -> LossOf:
    """The penalty in one backward pass, by PyTorch's own operators, which keep what they computed."""

    def loss_of(model: nn.Module) -> Loss:
        ours = penalised(layers)(model)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            with TwiceDifferentiableStock():
                return ours(images, labels)

        return loss

    return loss_of


class Variant(NamedTuple):
    """Whose step, and how it is run."""

    loss_of: Callable[[str], LossOf]  # of the penalised layers
    how: str = "calls"  # or "graph": dvf.graph_step, or "compiled": dvf.compile_loss
    exact: Callable[[str], LossOf] = eager  # what it has to equal
    layers: tuple[str, ...] = LAYERS


def _erm(_: str) -> LossOf:
    return stock_erm


def _published(_: str) -> LossOf:
    return published_loop


VARIANTS = {
    "ours": Variant(penalised),
    "ours, CUDA graph": Variant(penalised, "graph"),
    "eager one-pass": Variant(eager),
    "eager one-pass, CUDA graph": Variant(eager, "graph"),
    "published loop": Variant(_published, layers=("last",)),
    "stock ERM": Variant(_erm, exact=_erm),
    "stock ERM, CUDA graph": Variant(_erm, "graph", exact=_erm),
    "ours, compiled": Variant(penalised, "compiled"),  # last: Inductor keeps its graphs' memory
}


class Headline(NamedTuple):
    """One row: a model, the penalised layers, and whose step."""

    model: str
    layers: str
    variant: str

    @property
    def spec(self) -> Model:
        return MODELS[self.model]

    @property
    def group(self) -> str:
        dtype = str(self.spec.dtype).removeprefix("torch.")
        return f"training step {self.model} {self.layers} batch {self.spec.batch} {dtype}"

    def row(self) -> dict[str, object]:
        """What the row is called in a file of results."""
        return {
            **{"workload": "training step", "group": self.group, "order": DOUBLE_BWD},
            **{"implementation": self.variant, "shape": [self.spec.batch]},
            "dtype": str(self.spec.dtype).removeprefix("torch."),
            "first_order_only": False,
        }


def rows_of(model: str, layers: str) -> list[Headline]:
    return [Headline(model, layers, who) for who, one in VARIANTS.items() if layers in one.layers]


def make_model(name: str) -> nn.Module:
    """Return a model on the GPU; made on the CPU, always the same."""
    torch.manual_seed(0)
    known_as = MODELS[name].timm
    if known_as is None:
        return DiverseViT().to(DEVICE)
    import timm

    return timm.create_model(known_as, num_classes=2).to(DEVICE)


def make_batch(model: str, n: int) -> tuple[Tensor, Tensor]:
    height, width = (64, 32) if MODELS[model].timm is None else (224, 224)
    images = torch.rand(n, 3, height, width, device=DEVICE)
    return images, torch.arange(n, device=DEVICE) % 2


def step_of(
    case: Headline,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Step:
    """Return the step of a row, on this batch again and again."""
    variant = VARIANTS[case.variant]
    return run_as(
        variant.how, variant.loss_of(case.layers)(model), case.spec.dtype, batch, optimizer
    )


def run_as(
    how: str,
    loss: Loss,
    dtype: torch.dtype,
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Step:
    """Return the step with a loss: call by call, in one CUDA graph, or of a compiled loss."""
    amp = dtype if dtype == torch.bfloat16 else None
    if how == "graph":
        captured = dvf.graph_step(loss, optimizer, amp=amp)
        return lambda: captured(*batch)
    called = dvf.compile_loss(loss, mode="reduce-overhead") if how == "compiled" else loss

    def step() -> Tensor:
        if how == "compiled":
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        with torch.autocast(DEVICE, amp, enabled=amp is not None):
            value = called(*batch)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def check(case: Headline) -> None:
    """Compare loss and gradient of one step with PyTorch's own operators in float64: they may differ by 0.1 %.

    In bfloat16 twice the error of PyTorch's own operators in that dtype is allowed in addition, to the published
    loop three times.

    Raises:
        AssertionError: a wrong loss or gradient.
    """
    variant, dtype = VARIANTS[case.variant], case.spec.dtype
    model, batch = make_model(case.model), make_batch(case.model, CHECKED_BATCH)
    exact_of = variant.exact(case.layers)
    wide = (batch[0].double(), batch[1])
    exact = one_update("calls", exact_of, copy.deepcopy(model).double(), torch.float64, wide)
    found = one_update(
        variant.how, variant.loss_of(case.layers), copy.deepcopy(model), dtype, batch
    )
    own = [0.0] * len(exact)
    if dtype == torch.bfloat16:
        own = relative_errors(one_update("calls", exact_of, model, dtype, batch), exact)
    # the published loop adds up one rounded gradient per head: 2.08 times, measured on a Xeon with AMX
    times = 3 if case.variant == "published loop" else 2
    for error, rounding in zip(relative_errors(found, exact), own, strict=True):
        assert error <= 1e-3 + times * rounding, (
            f"{case.variant}: {error:.1e} off PyTorch's operators"
        )


def one_update(
    how: str, loss_of: LossOf, model: nn.Module, dtype: torch.dtype, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the loss of a step, and by how much a step of gradient descent of length 1 lowers the parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
    value = run_as(how, loss_of(model), dtype, batch, optimizer)()
    moved = [(old - new.detach()).flatten() for old, new in zip(before, parameters, strict=True)]
    return value, torch.cat(moved)


def measured(case: Headline) -> dict[str, object]:
    """Return what a row records: seconds by event, host time, and peak memory, weights and optimizer included."""
    free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = make_model(case.model)
    step = step_of(case, model, make_batch(case.model, case.spec.batch), make_optimizer(model))
    for _ in range(3):
        step()
    once = event_seconds(step)
    rounds = max(5, min(20, int(3 / max(once, 1e-3))))
    found = {
        "seconds": rounded([event_seconds(step) for _ in range(rounds)]),
        "host_seconds": host_seconds(step, 5),
    }
    return {**found, "peak_bytes": torch.cuda.max_memory_allocated() - before}


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def fits(case: Headline, model: nn.Module, n: int) -> bool:
    """Whether two steps on a batch of ``n`` images run within the GPU's memory."""
    free()
    try:
        step = step_of(case, model, make_batch(case.model, n), make_optimizer(model))
        step()
        step()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


MOST = 1 << 16
"""No larger batch is tried."""


def largest(trials: Mapping[int, bool]) -> int:
    """Return the largest batch that fitted so far; 0 for none."""
    return max((batch for batch, fitted in trials.items() if fitted), default=0)


def next_batch(trials: Mapping[int, bool], first: int) -> int | None:
    """Return the batch to try next, or None once the largest that fits is known to a thirty-second of it.

    It doubles until one does not fit, or halves until one does, then bisects.

    Args:
        trials: batch -> whether it fitted.
        first: the batch to begin with.
    """
    fitting = largest(trials)
    failing = min((batch for batch, fitted in trials.items() if not fitted), default=None)
    if failing is None:
        return None if fitting >= MOST else 2 * fitting or first
    if not fitting:
        return failing // 2 or None
    middle = (fitting + failing) // 2
    return middle if failing - fitting > max(1, fitting // 32) else None
