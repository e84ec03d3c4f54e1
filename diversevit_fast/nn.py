"""Modules built of the twice-differentiable operators, with the parameter names of torch.nn."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedError, usage_error
from .ops import attention_qkvpacked, gelu, layer_norm
from .ops.checks import check_choice
from .penalty.captured import Captured
from .penalty.head_gradients import head_gradients
from .penalty.input_projections import ProjectionOutput
from .penalty.layer_penalty import layer_penalty


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` with a fused double backward; same arguments and ``state_dict``."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axes of ``input`` [..., *normalized_shape]."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class GELU(nn.GELU):
    """``torch.nn.GELU`` with a fused double backward; same arguments."""

    def forward(self, input: Tensor) -> Tensor:
        """GELU of every element, any shape."""
        return gelu(input, self.approximate)


class _LastRun(weakref.WeakKeyDictionary):
    """The tensors of each module's last forward, stored outside the module.

    So copies and pickles of a module do not contain them, and they live only as long as the graph node
    of the module's output.
    """

    def record(self, module: nn.Module, output: Tensor, **tensors: Tensor) -> None:
        if not torch.compiler.is_compiling() and output.grad_fn is not None:
            metadata: Any = output.grad_fn.metadata
            metadata["diversevit_fast"] = tensors
            self[module] = {name: weakref.ref(x) for name, x in tensors.items()}

    def recall(self, module: nn.Module, name: str) -> Tensor | None:
        reference = self.get(module, {}).get(name)
        return reference() if reference is not None else None


_last_run = _LastRun()


class MultiHeadAttention(nn.Module):
    """Self-attention of a ViT: qkv projection, ``dvf.attention_qkvpacked``, output projection.

    Args:
        dim: model width D.
        num_heads: heads H.
        head_dim: head width d; ``dim // num_heads`` if None. ``H * d`` need not equal ``dim``.
        qkv_bias: whether the qkv projection has a bias.
        proj_bias: whether the output projection has a bias.

    The rows of ``qkv.weight`` [3 H d, D] are ordered (q, k, v), head, channel, as timm's are.

    Raises:
        UsageError: ``dim`` is not a multiple of ``num_heads`` and no ``head_dim`` is given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ):
        super().__init__()
        if num_heads < 1 or dim < 1:
            raise usage_error(
                "num_heads", "dim and num_heads of at least 1", (dim, num_heads), "fix it"
            )
        if head_dim is None and dim % num_heads:
            raise usage_error("num_heads", f"a divisor of dim={dim}", num_heads, "or pass head_dim")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.head_dim, dim, bias=proj_bias)

    def forward(
        self, x: Tensor, return_heads: bool = False, head_scale: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over the tokens of each sample.

        Args:
            x: ``[B, N, D]``.
            return_heads: also return the head outputs that the result was computed from.
            head_scale: ``[H]`` or ``[B, H]``, multiplies the head outputs (0 prunes a head).

        Returns:
            ``[B, N, D]``, and with ``return_heads`` the (scaled) head outputs ``[B, H, N, d]``.

        Raises:
            UsageError: ``head_scale`` has another shape.
        """
        B, N, _ = x.shape
        qkv = self.qkv(x)
        packed = qkv.view(B, N, 3, self.num_heads, self.head_dim)
        heads = attention_qkvpacked(packed).transpose(1, 2)
        if head_scale is not None:
            heads = heads * self._per_head(head_scale, B)
        out = self.proj(heads.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))
        _last_run.record(self, out, qkv=qkv, heads=heads)
        return (out, heads) if return_heads else out

    def class_token(self, x: Tensor, attend: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Compute ``forward(x)[:, 0]``, ``[B, D]``, by an ``attend`` that projects ``x`` and has one query."""
        qkv, heads = attend(x)
        heads = heads.transpose(1, 2)
        out = self.proj(heads.flatten(1))
        _last_run.record(self, out, qkv=qkv, heads=heads)
        return out

    def _per_head(self, scale: Tensor, batch: int) -> Tensor:
        if tuple(scale.shape) not in ((self.num_heads,), (batch, self.num_heads)):
            wanted = f"shape [{self.num_heads}] or [{batch}, {self.num_heads}]"
            raise usage_error("head_scale", wanted, list(scale.shape), "give one number per head")
        return scale[..., :, None, None]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class HeadPenalty(nn.Module):
    """The head-diversity penalty of one ``MultiHeadAttention``, for models you write yourself.

    >>> logits = model(images)                       # runs model.attn, a MultiHeadAttention
    >>> score = logits.max(-1).values
    >>> loss = F.cross_entropy(logits, labels) + 100 * head_penalty(score, model.attn)

    Everything between ``attention`` and the score must be twice differentiable: use ``dvf.nn``'s modules
    for attention, LayerNorm and GELU to have that in O(N) memory.

    Args:
        wrt, granularity, reduction: as in ``HeadDiversity``.

    Raises:
        UsageError: an unknown word.
    """

    def __init__(self, wrt: str = "input", granularity: str = "token", reduction: str = "all"):
        super().__init__()
        check_choice("wrt", wrt, ("input", "output"))
        check_choice("granularity", granularity, ("token", "sample"))
        check_choice("reduction", reduction, ("all", "pairs"))
        self.wrt, self.granularity, self.reduction = wrt, granularity, reduction

    def forward(self, score: Tensor, attention: MultiHeadAttention) -> Tensor:
        """The penalty, a scalar in [0, 1], from one backward pass for all heads.

        Args:
            score: ``[B]``, computed from the last forward of ``attention``.
            attention: the layer to regularise.

        Raises:
            UsageError: ``score`` does not depend on the last forward of ``attention``.
            UnsupportedError: inside a compiled loss.
        """
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "HeadPenalty: reads the last eager run; in a compiled loss use HeadDiversity, or "
                "return_heads=True with dvf.head_penalty"
            )
        wanted = "a score computed from the last forward of `attention`"
        hint = "run the model with gradients enabled, then ask for the penalty, before its backward"
        if not score.requires_grad:
            raise usage_error("score", wanted, "a tensor without a graph", hint)
        tensor = _last_run.recall(attention, "qkv" if self.wrt == "input" else "heads")
        if tensor is None or not tensor.requires_grad:
            raise usage_error("attention", "a forward whose graph is alive", "none", hint)
        run = self._run_of(attention, tensor)
        (grads,) = head_gradients(score, [run])
        if grads[0] is None:
            raise usage_error("score", wanted, "one that does not depend on it", hint)
        return layer_penalty(grads, run, self.granularity, self.reduction)[0]

    def _run_of(self, attention: MultiHeadAttention, tensor: Tensor) -> Captured:
        heads = attention.num_heads
        if self.wrt == "output":
            qkv = _last_run.recall(attention, "qkv")
            tokens = tensor.shape[2] if qkv is None else qkv.shape[1]
            return Captured(0, heads, tokens, tensor)
        weight = attention.qkv.weight
        made = ProjectionOutput(tensor, "qkv", weight, len(weight), by_head=tensor.ndim == 5)
        return Captured(0, heads, tensor.shape[1], projections=(made,))

    def extra_repr(self) -> str:
        return f"wrt={self.wrt!r}, granularity={self.granularity!r}, reduction={self.reduction!r}"
