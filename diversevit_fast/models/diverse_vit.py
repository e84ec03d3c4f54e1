"""The paper's vision transformer (arXiv 2308.16274), without a residual around its last attention.

Module tree: ``patch_embed``, ``cls_token``, ``pos_embed``, ``blocks[i].{norm1, attn, norm2, mlp}``,
``norm``, ``head``. Shapes in the legend of the package: images ``[B, C, height, width]``, tokens
``[B, N, D]`` with the class token first.
"""

from collections.abc import Sequence
from functools import partial
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import nn as dnn
from .._torch_internals import runs_as_written
from ..attachment.class_token import Attend, own_forwards, register_class_token_model
from ..errors import usage_error
from . import published, store
from .sizes import check_config


class Block(nn.Module):
    """LayerNorm, attention, LayerNorm, MLP; the MLP always has its residual.

    Args:
        dim: model width D.
        num_heads: heads H.
        head_dim: head width d.
        mlp_dim: hidden width of the MLP.
        residual: whether the attention has a residual connection around it.
    """

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, mlp_dim: int, residual: bool = True
    ):
        super().__init__()
        self.residual = residual
        self.norm1 = dnn.LayerNorm(dim)
        self.attn = dnn.MultiHeadAttention(dim, num_heads, head_dim, qkv_bias=False)
        self.norm2 = dnn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), dnn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor, class_token_only: bool = False) -> Tensor:
        """``[B, N, D] -> [B, N, D]``, or ``[B, 1, D]`` with ``class_token_only``.

        Only attention mixes tokens, so after it the class token can be computed alone.
        """
        y = cast(Tensor, self.attn(self.norm1(x)))
        if class_token_only:
            x, y = x[:, :1], y[:, :1]
        return self.after_attention(x, y)

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the rest of the block from its input ``x`` and its attention's output ``y``."""
        x = x + y if self.residual else y
        return x + self.mlp(self.norm2(x))

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


class DiverseViT(nn.Module):
    """The published model; the defaults are its configuration for MNIST-CIFAR.

    Patches are flattened row, column, channel and embedded by one linear map; the positions are
    learned; the head reads the class token after a final LayerNorm. Positions and class token start
    standard normal, linear maps as PyTorch's default, as published.

    Args:
        image_size: height and width in pixels, multiples of ``patch_size``.
        patch_size: side of a square patch in pixels.
        channels: image channels C.
        num_classes: logits per image.
        dim: model width D.
        depth: number of blocks.
        num_heads: heads H per block.
        head_dim: head width d; ``num_heads * head_dim`` need not equal ``dim``.
        mlp_dim: hidden width of each MLP.
        last_residual: keep the residual around the last attention, which the paper removes.

    ``config`` holds these arguments.

    Raises:
        UsageError: a size is not a positive integer or beyond reason, or the image is not a whole number of
            patches.
    """

    def __init__(
        self,
        image_size: Sequence[int] = (64, 32),
        patch_size: int = 4,
        channels: int = 3,
        num_classes: int = 2,
        dim: int = 64,
        depth: int = 6,
        num_heads: int = 4,
        head_dim: int = 64,
        mlp_dim: int = 128,
        last_residual: bool = False,
    ):
        super().__init__()
        config = {
            "image_size": image_size,
            "patch_size": patch_size,
            "channels": channels,
            "num_classes": num_classes,
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "mlp_dim": mlp_dim,
            "last_residual": last_residual,
        }
        check_config(config)
        height, width = image_size
        self.config: dict[str, Any] = {**config, "image_size": (height, width)}
        patches = (height // patch_size) * (width // patch_size)
        self.patch_embed = nn.Linear(patch_size**2 * channels, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + patches, dim))
        residuals = [True] * (depth - 1) + [last_residual]
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, head_dim, mlp_dim, residual) for residual in residuals
        )
        self.norm = dnn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    @property
    def kept_heads(self) -> dict[int, tuple[int, ...]]:
        """The heads that each layer still has, by their indices before pruning."""
        attentions = [cast(Block, block).attn for block in self.blocks]
        return {
            layer: tuple(getattr(attn, "kept_heads", range(attn.num_heads)))
            for layer, attn in enumerate(attentions)
        }

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, height, width] -> [B, num_classes]``.

        Raises:
            UsageError: images of another shape, dtype or device than the model's.
        """
        x = self.blocks[-1](self.features(images), class_token_only=True)
        return self.head(self.norm(x[:, 0]))

    def features(self, images: Tensor) -> Tensor:
        """Compute the tokens ``[B, N, D]`` that enter the last block.

        Raises:
            UsageError: images of another shape, dtype or device than the model's.
        """
        self._check_images(images)
        x = self.patch_embed(to_patches(images, self.config["patch_size"]))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def head_logits(self, images: Tensor) -> Tensor:
        """Compute the logits of all heads, then of each head of the last layer alone.

        A head alone is the published test-time pruning: the other head outputs times zero, this one
        times H. The trunk and the last attention run once for all; H counts the heads that the last
        layer still has.

        Returns:
            ``[1 + H, B, num_classes]``.

        Raises:
            UsageError: images of another shape, dtype or device than the model's.
        """
        count = cast(Block, self.blocks[-1]).attn.num_heads
        every = list(range(count))
        return self.subset_logits(images, [every, *([head] for head in every)])

    def subset_logits(self, images: Tensor, subsets: Sequence[Sequence[int]]) -> Tensor:
        """Compute the logits with each subset of the last layer's heads, as inside ``keep_heads``.

        The trunk and the last attention run once for all.

        Args:
            images: as in ``forward``.
            subsets: the heads that stay, at least one in each.

        Returns:
            ``[subsets, B, num_classes]``.

        Raises:
            UsageError: images of another shape, dtype or device than the model's.
        """
        x = self.features(images)
        last = cast(Block, self.blocks[-1])
        _, heads = last.attn(last.norm1(x), return_heads=True)
        heads = heads[:, :, 0]  # [B, H, d] of the class token, all that is pooled
        count = heads.shape[1]
        keep = [[count / len(s) if h in s else 0.0 for h in range(count)] for s in subsets]
        keep = torch.tensor(keep, dtype=heads.dtype, device=heads.device)
        y = last.attn.proj((keep[:, None, :, None] * heads).flatten(-2))
        return self.head(self.norm(last.after_attention(x[:, 0], y)))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the weights, the configuration and the kept heads as one safetensors file.

        Raises:
            UsageError: the folder does not exist, or safetensors is not installed.
        """
        store.save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "DiverseViT":
        """Load the model that ``save`` wrote to ``path``, pruned as it was, on the CPU.

        Raises:
            UsageError: no such file, or not one that ``save`` wrote.
        """
        return store.load(path, cls)

    @classmethod
    def from_published_checkpoint(
        cls,
        path: str | PathLike[str],
        *,
        num_heads: int = 4,
        image_size: Sequence[int] = (64, 32),
    ) -> "DiverseViT":
        """Import the weights the authors published (a ``.pth`` file), on the CPU.

        Nothing but tensors is unpickled. Every size is read off the tensors, except the two below,
        which leave no trace in their shapes.

        Args:
            path: a state dict with the published key names, bare or under the one key
                ``"state_dict"`` or ``"model"``.
            num_heads: heads the model was trained with.
            image_size: height and width it was trained on.

        Raises:
            UsageError: no such file; not a file of tensors; a key is missing, unknown or of the
                wrong shape (named); the two arguments do not fit the tensors.
        """
        return published.load(path, cls, num_heads=num_heads, image_size=image_size)

    def _check_images(self, images: Tensor) -> None:
        weight = self.patch_embed.weight
        shape = (self.config["channels"], *self.config["image_size"])
        if not isinstance(images, Tensor):
            raise usage_error("images", "a tensor", type(images).__name__, "use torch.as_tensor")
        if images.ndim != 4 or images.shape[1:] != shape:
            wanted = f"shape [B, {', '.join(map(str, shape))}]"
            raise usage_error(
                "images", wanted, list(images.shape), "resize them, or set image_size"
            )
        if not images.is_floating_point():
            hint = "convert bytes with images.float() / 255"
            raise usage_error("images", "a floating dtype", images.dtype, hint)
        if images.device != weight.device:
            hint = "move the images or the model"
            raise usage_error("images", f"device {weight.device}", images.device, hint)
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
            hint = "cast the images or the model"
            raise usage_error("images", f"the model's dtype {weight.dtype}", images.dtype, hint)


def _direct_forward(block: Any, x: Tensor, attend: Attend) -> Tensor:
    """``Block.forward`` for the class token, its attention by ``attend``."""
    y = block.attn.class_token(block.norm1(x), attend)
    return block.after_attention(x[:, 0], y).unsqueeze(1)


_FORWARDS = own_forwards(
    dnn.MultiHeadAttention, dnn.LayerNorm, dnn.GELU, nn.Linear, nn.Identity, nn.Sequential
)
register_class_token_model(
    DiverseViT,
    Block,
    partial(Block.forward, class_token_only=True),
    direct=lambda block: _direct_forward if runs_as_written(block, _FORWARDS) else None,
)


def to_patches(images: Tensor, size: int) -> Tensor:
    """Cut images ``[B, C, height, width]`` into patches ``[B, patches, size * size * C]``, (p1 p2 c) each."""
    B, C, height, width = images.shape
    grid = images.reshape(B, C, height // size, size, width // size, size)
    patches = (height // size) * (width // size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(B, patches, size * size * C)
