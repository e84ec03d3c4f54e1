"""HeadDiversity: the penalty on the gradients of a model's attention heads, for any training loop."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attach import Attachment, AttentionLayer, Forward, choose_layers
from .class_token import one_token_block, one_token_forward
from .errors import UnsupportedError, expected
from .head_gradients import (
    Captured,
    Target,
    check_target,
    head_gradients,
    layer_penalty,
    prediction_score,
    unreached,
)
from .ops import attention, gelu, layer_norm
from .ops.checks import check_choice


class HeadDiversity(Attachment):
    """Makes a ViT's heads look at different things: the regulariser of DiverseViT.

    >>> diversity = HeadDiversity(model, layers="last", wrt="input")
    >>> for images, labels in loader:
    ...     with diversity:
    ...         logits = model(images)
    ...     loss = F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)
    ...     loss.backward()

    Inside the ``with`` block the attention, LayerNorm and GELU calls above the lowest chosen layer are
    the twice-differentiable operators, and what the penalty needs is captured. Leaving the block
    restores everything; parameters, ``state_dict`` and other modules are never changed.

    Where only the class token of the last block is read (DiverseViT, and timm's VisionTransformer with
    ``global_pool="token"``, called as a whole, no hooks on that block), the last block is computed
    for the class token alone: the same logits and penalty, O(N d) attention.

    Args:
        model: a model with timm ``Attention`` or ``dvf.nn.MultiHeadAttention`` layers.
        layers: ``"last"`` (the paper), ``"all"``, or a list of indices (negative allowed). The penalty
            is the mean over the chosen layers.
        wrt: ``"input"`` (the paper): gradients that each head alone passes to its layer's input,
            through the qkv projection. ``"output"``: gradients of the head outputs.
        granularity: ``"token"`` (the paper) or ``"sample"``: one Gram matrix per token, or per sample.
        reduction: ``"all"`` (the paper) divides by H^2, ``"pairs"`` by H (H - 1).
        target: what is differentiated: ``"logit"`` (the largest, the paper), ``"probability"``, or a
            callable from logits ``[B, classes]`` to scores ``[B]``.

    Attributes:
        cosines: after ``penalty``, the detached cosine Gram matrices, one tensor per chosen layer:
            ``[B, N, H, H]`` per token (``[B, 1, H, H]`` where only the class token has a gradient) or
            ``[B, H, H]`` per sample.
        num_heads: the head count of each chosen layer.

    Raises:
        UsageError: unknown words or layers, no attention found, one head with ``"pairs"``.
        UnsupportedError: the model is compiled at or above a chosen layer.

    Source: arXiv 2308.16274, section 3; all heads from one backward pass instead of one each.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Sequence[int] = "last",
        wrt: str = "input",
        granularity: str = "token",
        reduction: str = "all",
        target: Target = "logit",
    ):
        check_choice("wrt", wrt, ("input", "output"))
        check_choice("granularity", granularity, ("token", "sample"))
        check_choice("reduction", reduction, ("all", "pairs"))
        check_target(target)
        super().__init__(model, choose_layers(model, layers))
        self.wrt, self.granularity, self.reduction = wrt, granularity, reduction
        self.target: Target = target
        self.num_heads = [layer.num_heads for layer in self.layers]
        if reduction == "pairs" and 1 in self.num_heads:
            raise expected(
                "reduction", "'all' for a layer with one head", "'pairs'", "a pair needs two"
            )
        self.cosines: list[Tensor] = []
        self._captured: list[Captured] = []
        self._class_token_only = False
        self._wrap_last_block()

    def penalty(self, logits: Tensor) -> Tensor:
        """The head-diversity penalty of the forward run in the last ``with`` block: a scalar, in [0, 1].

        Differentiable with respect to everything the logits depend on. What was captured is let go
        afterwards, so it can be asked for once per ``with`` block.

        Args:
            logits: ``[B, classes]``, as the model returned them.

        Raises:
            UsageError: logits not computed under this context, without a graph, or not finite.
        """
        score = prediction_score(logits, self.target)
        captured, self._captured = self._captured, []
        grads = head_gradients(score, captured) if captured else []
        values: dict[int, list[Tensor]] = {layer.index: [] for layer in self.layers}
        cosines: dict[int, Tensor] = {}
        for grad, run in zip(grads, captured, strict=True):
            if grad is not None:
                value, cosine = layer_penalty(grad, run, self.granularity, self.reduction)
                values[run.layer].append(value)
                cosines[run.layer] = cosine.detach()
        missing = [layer.name for layer in self.layers if not values[layer.index]]
        if missing:
            raise unreached(missing)
        self.cosines = [cosines[layer.index] for layer in self.layers]
        return torch.stack([torch.stack(runs).mean() for runs in values.values()]).mean()

    def __enter__(self) -> "HeadDiversity":
        self._captured = []
        super().__enter__()
        return self

    def projected(self, layer: AttentionLayer, qkv: Tensor) -> Tensor:
        if self.wrt == "output" or not torch.is_grad_enabled():
            return qkv
        qkv = _in_graph(qkv)
        self._captured.append(Captured(layer.index, qkv, qkv.shape[1], layer.weight_qkv))
        return qkv

    def attended(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        q, k, v = qkv
        tokens = q.shape[-2]
        one_token = self._class_token_only and layer is self._last
        if one_token:
            q = q[..., :1, :]
        attend = attention if self._captured else attend
        heads = attend(q, k, v, **options)
        if self.wrt == "output" and torch.is_grad_enabled():
            heads = _in_graph(heads)
            self._captured.append(Captured(layer.index, heads, tokens))
        return heads.expand(*heads.shape[:-2], tokens, heads.shape[-1]) if one_token else heads

    def elsewhere(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ours = _TWICE_DIFFERENTIABLE.get(func) if self._captured else None
        if ours is None:
            return func(*args, **kwargs)
        return ours(*args, **{_ALIASES.get(name, name): x for name, x in kwargs.items()})

    def _wrap_last_block(self) -> None:
        """Take the few-query path in forwards of the whole model that allow it."""
        self._last = self.layers[-1]

        def whole_model(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            block = one_token_block(module, self._last.module)
            self._class_token_only = block is not None and len(args) == 1 and not kwargs
            try:
                return forward(*args, **kwargs)
            finally:
                self._class_token_only = False

        def last_block(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            if self._class_token_only:
                return one_token_forward(module, *args)
            return forward(*args, **kwargs)

        block = one_token_block(self.model, self._last.module)
        if block is not None:
            self.wrap(self.model, whole_model)
            self.wrap(block, last_block)


def _in_graph(x: Tensor) -> Tensor:
    """``x``, or a leaf with its values where a frozen model gave it no graph."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
    if hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook."):
        raise UnsupportedError(
            "model: a chosen layer runs inside activation checkpointing, which would recompute it "
            "without this context; checkpoint only the blocks below the chosen layers"
        )
    return x if x.requires_grad else x.detach().requires_grad_()


_TWICE_DIFFERENTIABLE: dict[Any, Forward] = {
    F.scaled_dot_product_attention: attention,
    F.layer_norm: layer_norm,
    F.gelu: gelu,
}
_ALIASES = {"input": "x", "query": "q", "key": "k", "value": "v"}
