"""The published regulariser, restated: one backward pass per head, each with the others masked."""

import torch
from torch import Tensor, nn

import diversevit_fast as dvf


def published_penalty(
    model: nn.Module, images: Tensor, attention: nn.Module, wrt: str = "input"
) -> tuple[Tensor, Tensor]:
    """Logits, and the per-token penalty of the layer whose attention module is ``attention``.

    u_h is the gradient of the head's output o_h, weighted by g_h = dp*/do_h, with respect to the
    attention's input; cosines of every token's H gradients; mean of squares, diagonal counted as zero.
    """
    seen = {}
    handle = attention.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    index = [m for _, m in model.named_modules() if m is attention or is_attention(m)]
    with (
        dvf.capture_heads(model) as heads,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        logits = model(images)
    handle.remove()
    out = heads[index.index(attention)]
    (g,) = torch.autograd.grad(logits.max(-1).values.sum(), out, create_graph=True)
    if wrt == "output":
        u = g.transpose(1, 2)
    else:
        masks = torch.eye(out.shape[1], dtype=out.dtype)[:, None, :, None, None]
        u = torch.stack(
            [torch.autograd.grad(out, seen["x"], g * m, create_graph=True)[0] for m in masks], 2
        )
    unit = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    off_diagonal = 1 - torch.eye(unit.shape[2], dtype=unit.dtype)
    return logits, ((unit @ unit.mT) * off_diagonal).square().mean()


def is_attention(module: nn.Module) -> bool:
    return hasattr(module, "qkv") and hasattr(module, "num_heads")
