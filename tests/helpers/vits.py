"""Small float64 ViTs, their inputs, penalties and gradients, for tests at the model level."""

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import diversevit_fast as dvf
from diversevit_fast.models import DiverseViT


def diverse_vit(**options) -> DiverseViT:
    torch.manual_seed(0)
    sizes = {
        **{"image_size": (16, 8), "dim": 16, "depth": 3},
        **{"num_heads": 4, "head_dim": 8, "mlp_dim": 24},
    }
    return DiverseViT(**{**sizes, **options}).double()


def timm_vit(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3}
    sizes["num_classes"] = 5
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).double()


VITS = {
    "diverse-vit": diverse_vit,
    "timm": timm_vit,
    "timm-average-qk-norm": lambda: timm_vit(global_pool="avg", class_token=False, qk_norm=True),
}


def images_for(model: nn.Module, batch: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(1)
    size = (16, 8) if isinstance(model, DiverseViT) else (16, 16)
    return torch.randn(batch, 3, *size, generator=g, dtype=torch.float64)


def labels_for(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % 2


def attentions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "qkv")]


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Of every parameter that is trained, zeros where the loss does not reach it."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal to float64 rounding, and somewhere not zero."""
    assert max(b.abs().max() for b in theirs) > 1e-6
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


def step(model, diversity, images):
    """Logits and penalty."""
    with diversity:
        logits = model(images)
    return logits, diversity.penalty(logits)


def full(model, images, **options):
    """The penalty of every sample."""
    return step(model, dvf.HeadDiversity(model, **options), images)[1]


class Calls(TorchFunctionMode):
    """Which attention a forward calls, and on how many samples."""

    def __init__(self):
        super().__init__()
        self.stock, self.ours = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        ours = dict.fromkeys((dvf.attention, dvf.attention_qkvpacked), self.ours)
        seen = {F.scaled_dot_product_attention: self.stock, **ours}
        if func in seen:
            seen[func].append(len(args[0]))
        return func(*args, **(kwargs or {}))
