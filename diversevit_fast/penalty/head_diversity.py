"""HeadDiversity: the penalty on the gradients of a model's attention heads, for any training loop."""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch_internals import in_checkpoint
from ..attachment.attachment import Attachment, Forward
from ..attachment.attention_modules import AttentionLayer, blocks_from, choose_layers
from ..attachment.batch_checks import batch_of, check_batch
from ..attachment.class_token import ClassTokenShortcut
from ..attachment.graph_checks import refuse_opaque
from ..attachment.indices import Integers
from ..attachment.parallel import check_ddp_forward, is_ddp, kept_unsharded, unwrapped
from ..attachment.support import refuse
from ..attachment.torch_mha import multi_head_attention
from ..attachment.unfused_attention import Unfused
from ..errors import UnsupportedError, usage_error
from ..ops import attention, gelu, layer_norm
from ..ops.checks import check_choice
from .grad_scale import InnerScale
from .head_gradients import (
    Captured,
    HeadGradients,
    Projected,
    Target,
    check_logits,
    check_target,
    head_gradients,
    layer_penalty,
    prediction_score,
    unreached,
)
from .input_projections import read_from_input
from .sample_split import SampleSplit


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

    Two ways to pay less, which combine; the gradient stays right on average:

    * ``every=k``: the penalty every k-th step, times k. A step is one entry of the ``with`` block with
      gradients enabled; training or eval mode does not matter, and each micro-batch of an accumulated
      gradient is one. The first step has the penalty. In between the ``with`` block does nothing at all,
      and ``penalty`` is a constant zero, as often as it is asked.
    * ``fraction=f``: the penalty of ``round(f * B)`` samples, at least one, drawn anew in each ``with``
      block: the mean over all draws is the full penalty, and so is the gradient's. From the lowest
      chosen layer's block up the drawn samples run apart from the others, which run as without
      this context, so second order costs a fraction f of what it did. Each block must take one
      tensor, pass what it returns on to the next, and treat samples independently; it costs a copy
      of each block's output. With all layers of a ViT-S a step took 0.75 (f = 1/2) and 0.59 (1/4) of
      its time on two CPU cores; with the last layer alone 0.98 and 0.96: there is little to save.

    Inside ``dvf.compile_loss`` neither is available.

    Args:
        model: a ViT of timm, transformers, torchvision or open_clip, or of ``dvf.nn``; also inside DDP, or
            sharded by FSDP2. ``dvf.supported(model)`` says which of its layers allow what.
        layers: ``"last"`` (the paper), ``"all"``, or indices (negative allowed), as a list, a tensor or the like. The
            penalty is the mean over the chosen layers.
        wrt: ``"input"`` (the paper): gradients that each head alone passes to its layer's input,
            through its queries, keys and values, be it by q/k norm and RoPE. Where the queries are
            made of another tensor (attention pooling), the input is that of keys and values.
            ``"output"``: gradients of the head outputs, as attention returns them (before any
            gate or norm across heads).
        granularity: ``"token"`` (the paper) or ``"sample"``: one Gram matrix per token, or per sample.
        reduction: ``"all"`` (the paper) divides by H^2, ``"pairs"`` by H (H - 1).
        target: what is differentiated: ``"logit"`` (the largest, the paper), ``"probability"``, or a
            callable from logits ``[B, classes]`` to scores ``[B]``, each of its own sample.
        every: k, a whole number of at least 1.
        fraction: f, above 0 and at most 1.
        generator: draws the samples; PyTorch's global one of the samples' device if None.
        grad_scale: factor on the prediction whose gradient is taken; the penalty does not depend on it.
            None: 1, and where gradients are float16 one that neither overflows nor vanishes (costs a
            synchronisation each step).

    Attributes:
        cosines: of the last ``penalty`` that was not a zero of ``every``, the detached cosine Gram
            matrices, one tensor per chosen layer: ``[B, N, H, H]`` per token (``[B, 1, H, H]`` where only
            the class token has a gradient) or ``[B, H, H]`` per sample; of the drawn samples only.
        samples: their indices into the batch, ``[n]``; None if they are all.
        num_heads: the head count of each chosen layer.
        step: how many steps were counted; set it to resume a training where it was.

    Raises:
        UsageError: unknown words or layers, no attention found, one head with ``"pairs"``, an ``every``
            or ``fraction`` out of range.
        UnsupportedError: the model is compiled at or above a chosen layer; a chosen layer does not
            allow ``wrt``; FSDP1, DataParallel, DDP with ``static_graph``, a DDP model whose inside is called
            past it; with ``fraction`` below 1, a block with BatchNorm, or one called with several tensors.

    Source: arXiv 2308.16274, section 3; all heads from one backward pass instead of one each.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | Integers = "last",
        wrt: str = "input",
        granularity: str = "token",
        reduction: str = "all",
        target: Target = "logit",
        every: int = 1,
        fraction: float = 1.0,
        generator: torch.Generator | None = None,
        grad_scale: float | None = None,
    ):
        check_choice("wrt", wrt, ("input", "output"))
        check_choice("granularity", granularity, ("token", "sample"))
        check_choice("reduction", reduction, ("all", "pairs"))
        check_target(target)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise usage_error(
                "every", "a whole number of at least 1", repr(every), "1 is each step"
            )
        self._in_ddp = is_ddp(model)
        model = unwrapped(model)
        self._split = SampleSplit(fraction, generator)
        super().__init__(model, choose_layers(model, layers))
        refuse(self.layers, f"wrt={wrt!r}")
        self.wrt, self.granularity, self.reduction = wrt, granularity, reduction
        self.target: Target = target
        self.num_heads = [layer.num_heads for layer in self.layers]
        if reduction == "pairs" and 1 in self.num_heads:
            raise usage_error(
                "reduction", "'all' for a layer with one head", "'pairs'", "a pair needs two"
            )
        self.every, self.step = every, 0
        self.cosines: list[Tensor] = []
        self.samples: Tensor | None = None
        self._scale = InnerScale(grad_scale)

    def _begin_apart(self) -> None:
        super()._begin_apart()
        self._captured: list[Captured] = []
        # of the running layer, with their inputs
        self._projected: list[tuple[Projected, Tensor]] = []
        self._batches: list[int] = []  # of the whole model's forwards
        self._class_token = ClassTokenShortcut()

    def __getstate__(self) -> dict[str, Any]:
        own = {"_scale": copy(self._scale), "_split": copy(self._split)}
        return {**super().__getstate__(), **own}

    def penalty(self, logits: Tensor) -> Tensor:
        """The head-diversity penalty of the forward run in the last ``with`` block: a scalar.

        In [0, 1] times ``every``. Differentiable with respect to everything the logits depend on. What
        was captured is let go afterwards, so it can be asked for once per ``with`` block. After a
        block that ``every`` leaves out: a zero without a graph. Of an empty batch: a zero. Under
        ``no_grad``: the value alone. Several forwards in one block count by their samples.

        Args:
            logits: ``[B, classes]``, as the model returned them.

        Raises:
            UsageError: logits not computed under this context, of other samples, without a graph, or
                not finite.
            UnsupportedError: what lies between a chosen layer and the logits runs compiled or in
                reentrant checkpointing; float16 gradients overflow.
        """
        if not self._active:
            check_logits(logits)
            return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        score = prediction_score(logits, self.target)
        captured, self._captured = self._captured, []
        if not len(score):
            self.cosines, self.samples = [], None
            return score.sum().float() * 0
        if not torch.compiler.is_compiling():
            refuse_opaque(score, [x for run in captured for x in run.tensors])
        samples = self._split.samples(len(score)) if captured else None
        grads, scale = self._differentiate(score, captured) if captured else ([], 1.0)
        values: dict[int, list[Tensor]] = {layer.index: [] for layer in self.layers}
        sizes: dict[int, list[int]] = {layer.index: [] for layer in self.layers}
        cosines: dict[int, Tensor] = {}
        for grad, run in zip(grads, captured, strict=True):
            if any(g is not None for g in grad):
                value, cosine = layer_penalty(grad, run, self.granularity, self.reduction, scale)
                sizes[run.layer].append(len(run.tensors[0]))
                values[run.layer].append(value * sizes[run.layer][-1])
                cosines[run.layer] = cosine.detach()
        missing = [layer.name for layer in self.layers if not values[layer.index]]
        if missing:
            raise unreached(missing)
        self._check_batches(sizes, len(score), samples)
        self.cosines = [cosines[layer.index] for layer in self.layers]
        self.samples = samples
        of_layers = [torch.stack(values[i]).sum() / sum(sizes[i]) for i in values]
        return torch.stack(of_layers).mean() * self.every

    def __enter__(self) -> "HeadDiversity":
        super().__enter__()
        return self

    def active(self) -> bool:
        self._captured, self._batches = [], []
        self._split.forget()
        if torch.compiler.is_compiling():
            self._refuse_amortised()
            return True
        if not torch.is_grad_enabled():
            return True
        self.step += 1
        return (self.step - 1) % self.every == 0

    def started(self, layer: AttentionLayer) -> None:
        self._projected = []

    def projected(
        self, layer: AttentionLayer, roles: str, x: Tensor, weight: Tensor, out: Tensor
    ) -> Tensor:
        if self.wrt == "output" or not self._capturing():
            return out
        out = self._followed(layer, out)
        self._projected.append((Projected(out, roles, weight, layer.rows_of(roles)), x))
        return out

    def attended(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        q, k, v = qkv
        tokens = q.shape[-2]
        one_token = self._class_token.active and layer is self.layers[-1]
        if one_token:
            q = q[..., :1, :]
        if self._second_order() and not isinstance(attend, Unfused):
            attend = attention
        heads = attend(q, k, v, **options)
        if self._capturing():
            if self.wrt == "output":
                heads = self._followed(layer, heads)
                run = Captured(layer.index, layer.num_heads, tokens, heads)
            else:
                made = read_from_input(layer, self._projected)
                run = Captured(layer.index, layer.num_heads, tokens, projected=made)
            self._captured.append(run)
            self._projected = []
        return heads.expand(*heads.shape[:-2], tokens, heads.shape[-1]) if one_token else heads

    def elsewhere(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ours = _TWICE_DIFFERENTIABLE.get(func) if self._second_order() else None
        if ours is None:
            return func(*args, **kwargs)
        if ours is multi_head_attention:
            return multi_head_attention(args, kwargs)
        return ours(*args, **{_ALIASES.get(name, name): x for name, x in kwargs.items()})

    def _capturing(self) -> bool:
        return torch.is_grad_enabled() and not self._split.with_rest

    def _followed(self, layer: AttentionLayer, x: Tensor) -> Tensor:
        """``x``, or where a frozen model gave it no graph, one that begins there."""
        if not torch.compiler.is_compiling():
            self._split.check_reached(layer.name, len(x))
            _refuse_checkpointing()
            check_ddp_forward(self._in_ddp)
        return x if x.requires_grad else x.detach().requires_grad_()

    def _differentiate(
        self, score: Tensor, captured: list[Captured]
    ) -> tuple[list[HeadGradients], float]:
        tensors = [x for run in captured for x in run.tensors]
        with kept_unsharded(self.model):
            return self._scale.apply(
                tensors, lambda factor: head_gradients(score, captured, factor)
            )

    def _check_batches(
        self, sizes: dict[int, list[int]], batch: int, samples: Tensor | None
    ) -> None:
        if torch.compiler.is_compiling():
            return
        drawn = batch if samples is None else len(samples)
        batches = [n * drawn // batch for n in self._batches]
        for layer in self.layers:
            check_batch(layer.name, sizes[layer.index], drawn, batches, self.granularity)

    def _second_order(self) -> bool:
        """Whether what runs now is differentiated twice: it may depend on a captured tensor."""
        return bool(self._captured or self._projected) and (
            not self._split.with_rest or self._split.entangled
        )

    def _refuse_amortised(self) -> None:
        if self.every > 1 or self._split.fraction < 1:
            raise UnsupportedError(
                "every, fraction: not available inside a compiled loss; make the HeadDiversity with "
                "every=1 and fraction=1, and call an uncompiled loss without it in between"
            )

    def _wrap_all(self) -> None:
        """Note each batch, and take the few-query path in forwards of the whole model that allow it.

        Where only some samples have the penalty, the blocks run in two parts.
        """
        super()._wrap_all()
        self._class_token.wrap(self, self.layers[-1])
        self.wrap(self.model, self._note_batch)
        for split in blocks_from(self.model, self.layers[0]) if self._split.fraction < 1 else ():
            self.wrap(split, self._split.wrapper_of(split))

    def _note_batch(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        self._batches.append(batch_of(args, kwargs))
        return forward(*args, **kwargs)


def _refuse_checkpointing() -> None:
    if in_checkpoint():
        raise UnsupportedError(
            "model: a chosen layer runs inside activation checkpointing, which would recompute it "
            "without this context; checkpoint only the blocks below the chosen layers"
        )


_TWICE_DIFFERENTIABLE: dict[Any, Forward] = {
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
    F.layer_norm: layer_norm,
    F.gelu: gelu,
}
_ALIASES = {"input": "x", "query": "q", "key": "k", "value": "v"}
