"""HeadDiversity: the penalty on the gradients of a model's attention heads, for any training loop."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import in_checkpoint
from ..attachment.attachment import Attachment, Forward, Moment
from ..attachment.attention_modules import AttentionLayer, blocks_from, choose_layers
from ..attachment.call_arguments import batch_size
from ..attachment.class_token import ClassTokenShortcut
from ..attachment.graph_checks import depends_on
from ..attachment.indices import Integers
from ..attachment.parallel import (
    check_ddp_forward,
    is_ddp,
    keep_unsharded,
    unwrap,
    watch_backward,
)
from ..attachment.replacements import OPERATORS, call_second_order
from ..attachment.support import refuse
from ..attachment.torch_calls import open_attachments, paused
from ..errors import UnsupportedError, usage_error
from ..ops.checks import check_choice
from . import graph_capture
from .batch_checks import check_batches, check_reached
from .captured import Captured, Recording
from .checkpointed_blocks import CheckpointedBlocks
from .finite_logits import FiniteLogits
from .grad_scale import InnerScale
from .head_gradients import HeadGradients, head_gradients
from .layer_penalty import LayerPenalties, layer_penalty
from .sample_split import SampleSplit
from .score import Target, check_logits, check_target, prediction_score


class HeadDiversity(Attachment):
    """The regulariser of DiverseViT: penalises attention heads whose gradients point the same way.

    >>> diversity = HeadDiversity(model, layers="last", wrt="input")
    >>> for images, labels in loader:
    ...     with diversity:
    ...         logits = model(images)
    ...     loss = F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)
    ...     loss.backward()

    Inside the ``with`` block attention, LayerNorm and GELU from the lowest chosen layer up are computed by
    the twice-differentiable operators, and the tensors that the penalty differentiates by are captured.
    Leaving the block restores everything; parameters, ``state_dict`` and other modules are never changed.

    Where only the class token of the last block is read (DiverseViT, and timm's VisionTransformer with
    ``global_pool="token"``, called as a whole, no hooks on that block), the last block is computed
    for the class token alone: the same logits and penalty, O(N d) attention.

    Attention dropout of a model in training mode is part of the forward, and of its penalty.

    Two options reduce the cost and can be combined; the gradient stays right on average:

    * ``every=k``: the penalty every k-th step, times k. A step is one entry of the ``with`` block with
      gradients enabled; training or eval mode does not matter, and each micro-batch of an accumulated
      gradient is one. The first step has the penalty. In between the ``with`` block does nothing at all,
      and ``penalty`` returns a constant zero, any number of times.
    * ``fraction=f``: the penalty of ``round(f * B)`` samples, at least one, drawn anew in each ``with``
      block: the mean over all draws is the full penalty, and so is the gradient's. From the lowest
      chosen layer's block up the drawn samples run separately from the others, which run as without
      this context, so second order costs the fraction f. Each block must take one
      tensor, pass what it returns on to the next, and treat samples independently; it costs a copy
      of each block's output. On two CPU cores a step of a ViT-S with all layers chosen took 0.75
      (f = 1/2) and 0.59 (f = 1/4) of the full time, with the last layer alone 0.98 and 0.96.

    Inside ``dvf.compile_loss`` neither is available.

    Args:
        model: a ViT of timm, transformers, torchvision or open_clip, or of ``dvf.nn``; also inside DDP, or
            sharded by FSDP2. ``dvf.supported(model)`` says which of its layers allow what.
        layers: ``"last"`` (the paper), ``"all"``, or indices (negative allowed), as a list, a tensor or the like. The
            penalty is the mean over the chosen layers.
        wrt: ``"input"`` (the paper): the gradient that each head alone passes to its layer's input,
            through its queries, keys and values, with q/k norm and RoPE if there are. Where the queries
            are made of another tensor (attention pooling), it is that of the input of keys and values.
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
        check_finite: whether logits with NaN or infinity are refused: by ``penalty`` on a CPU; on a GPU, which
            nothing waits for, by a later step or by ``check``. False for whoever looks at the loss himself.
        checkpoint_blocks: whether blocks that a non-reentrant checkpoint runs keep only what they were given in the
            pass to the heads' gradients too, and are computed again for each order of derivative. False: they keep
            what that pass computed again, which takes less time.

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

    replaced = frozenset(OPERATORS)

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
        check_finite: bool = True,
        checkpoint_blocks: bool = True,
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
        model = unwrap(model)
        self._split = SampleSplit(fraction, generator)
        super().__init__(model, choose_layers(model, layers))
        refuse(self.layers, f"wrt={wrt!r}")
        self.wrt, self.granularity, self.reduction = wrt, granularity, reduction
        self.keeps_heads = wrt == "output"
        self.target: Target = target
        self.num_heads = [layer.num_heads for layer in self.layers]
        if reduction == "pairs" and 1 in self.num_heads:
            raise usage_error(
                "reduction", "'all' for a layer with one head", "'pairs'", "a pair needs two"
            )
        self.every, self.step, self.fraction = every, 0, self._split.fraction
        self.cosines: list[Tensor] = []
        self.samples: Tensor | None = None
        self._scale = InnerScale(grad_scale)
        self.check_finite, self.checkpoint_blocks = bool(check_finite), bool(checkpoint_blocks)

    def __enter__(self) -> "HeadDiversity":
        super().__enter__()
        return self

    def penalty(self, logits: Tensor) -> Tensor:
        """Compute the head-diversity penalty of the forward run in the last ``with`` block, a scalar.

        It lies in [0, 1], times ``every``, and is differentiable with respect to everything the logits
        depend on. The captured tensors are released, so it can be computed once per ``with`` block.
        After a block that ``every`` leaves out it is a zero without a graph, for an empty batch a zero,
        and under ``no_grad`` the value alone. Several forwards in one block are weighted by their samples.

        Args:
            logits: ``[B, classes]``, as the model returned them.

        Raises:
            UsageError: logits not computed under this context, of other samples, without a graph, or
                not finite; on a GPU, that those of an earlier step were not finite.
            UnsupportedError: a module between a chosen layer and the logits is compiled or runs in
                reentrant checkpointing; float16 gradients overflow.
        """
        if not self._active:
            check_logits(logits)
            return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        check_logits(logits)
        if self.check_finite:
            self._finite.note(logits)
        score, weights = prediction_score(logits, self.target)
        earlier, samples = self._recording.earlier, None
        runs, linears = self._recording.take_runs()
        if not len(score):
            self.cosines, self.samples = [], None
            return score.sum().float() * 0
        if torch.compiler.is_compiling():
            check_reached(self.layers, {run.layer for run in runs})
        else:
            runs, samples = self._checked(runs, score, earlier)
        value, self.cosines = self._differentiate(score, runs, weights, linears).mean()
        self.samples = samples
        value = value if self.every == 1 else value * self.every
        watch_backward(self.model, self._recording.one_pass, logits, value)
        return value

    def check(self) -> None:
        """Wait for the steps so far, and refuse them if logits of one were not finite: for the end of an epoch.

        On a GPU a step's logits are looked at when it has run, and reported by the next ``with`` block or
        ``penalty`` at the earliest; of the last step, and of replays of a CUDA graph, only this tells.

        Raises:
            UsageError: logits of a step since the last report were not finite.
            UnsupportedError: in a replay, float16 gradients overflowed with a fixed ``grad_scale``.
        """
        self._finite.wait()

    def _checked(
        self, runs: list[Captured], score: Tensor, earlier: set[Any]
    ) -> tuple[list[Captured], Tensor | None]:
        """Check all that can be checked before the gradient, which is expensive.

        Returns:
            The runs that ``score`` depends on, and the indices of the drawn samples (None: all).
        """
        reached = depends_on(score, [run.tensors for run in runs], earlier)
        samples = self._split.samples(len(score)) if runs else None
        runs = [run for run, is_reached in zip(runs, reached, strict=True) if is_reached]
        check_reached(self.layers, {run.layer for run in runs})
        batches = self._recording.batches
        check_batches(self.layers, runs, batches, len(score), samples, self.granularity)
        return runs, samples

    def _differentiate(
        self,
        score: Tensor,
        runs: list[Captured],
        weights: Tensor | None,
        linears: list[Any],
    ) -> LayerPenalties:
        """The penalties of all runs, from the gradients of their heads."""
        penalties = LayerPenalties(runs, self.layers, self.granularity, self.reduction)

        kind, places = (
            (self.granularity, self.reduction),
            {id(run): i for i, run in enumerate(runs)},
        )

        def found(run: Captured, value: Tensor, cosines: Tensor) -> None:
            penalties.take(places[id(run)], value, cosines)

        def differentiate(factor):
            # of a factor on the device the penalty gets the value that the host knows: it scales eps alone
            scale = self._scale.value if isinstance(factor, Tensor) else factor
            with self._blocks.inner.running(partial(_of_run, scale, kind), found):
                return head_gradients(
                    *(score, runs, factor, weights),
                    on_run=lambda i, grads: penalties.add(i, grads, scale),
                    linears=linears,
                )

        tensors = [x for run in runs for x in run.tensors]
        with keep_unsharded(self.model):
            self._scale.apply(tensors, differentiate, self._finite.note_gradients)
        return penalties

    def on_enter(self) -> bool:
        self._recording = Recording()
        self._split.forget()
        if torch.compiler.is_compiling():
            self._refuse_amortised()
            return True
        self._finite.look()
        if not torch.is_grad_enabled():
            return True
        if self.every > 1 and not self._in_graph_step and graph_capture.capturing():
            raise graph_capture.refuse_every()
        self.step += 1
        return (self.step - 1) % self.every == 0

    def on_layer_start(self, layer: AttentionLayer) -> None:
        self._recording.start_layer()

    def on_projection(
        self, layer: AttentionLayer, roles: str, x: Tensor, weight: Tensor, out: Tensor
    ) -> Tensor:
        if self.wrt == "output" or not self._capturing():
            return out
        out = self._with_graph(layer, out)
        self._recording.add_projection(layer, roles, x, weight, out)
        return out

    def on_attention(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        q, k, v = qkv
        asked = tokens = q.shape[-2]
        if self._class_token.active and layer is self.layers[-1]:
            tokens = k.shape[-2]
            q = q if asked == 1 else q[..., :1, :]
        heads = attend(q, k, v, **options)
        if self._capturing():
            if self.wrt == "output":
                heads = self._with_graph(layer, heads)
            self._recording.finish_layer(layer, tokens, heads if self.wrt == "output" else None)
        answered = heads.shape[-2] == asked
        return heads if answered else heads.expand(*heads.shape[:-2], asked, -1)

    def on_torch_function(
        self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return (
            call_second_order(func, args, kwargs) if self._second_order() else func(*args, **kwargs)
        )

    def on_linear(self, x: Tensor, out: Tensor) -> None:
        if self._capturing() and not torch.compiler.is_compiling():
            self._recording.add_linear(x, out)

    def _second_order(self) -> bool:
        """True if what runs now is differentiated twice, since it may depend on a captured tensor."""
        apart = self._split.with_rest and not self._split.entangled
        return (self._recording.begun and not apart) or super()._second_order()

    def _capturing(self) -> bool:
        """True if what runs now belongs to the penalty."""
        return torch.is_grad_enabled() and not self._split.with_rest

    def _with_graph(self, layer: AttentionLayer, x: Tensor) -> Tensor:
        """Return ``x``, or where a frozen model gave it no graph, a copy that starts one."""
        if not torch.compiler.is_compiling() and self._resumed is None:
            self._refuse_other_draws()
            self._split.check_reached(layer.name, len(x))
            self._recording.one_pass = check_ddp_forward(self._in_ddp)
        return x if x.requires_grad else x.detach().requires_grad_()

    @property
    def runs_part(self) -> bool:
        """Whether a block is running on some of the samples alone."""
        return self._split.running

    def _refuse_other_draws(self) -> None:
        if self._split.fraction < 1 and in_checkpoint():
            raise UnsupportedError(
                "fraction: a block from the first chosen layer on runs inside activation checkpointing, which "
                "would draw other samples when it recomputes; checkpoint only the blocks below, or use fraction=1"
            )

    def _refuse_amortised(self) -> None:
        if self.every > 1 or self._split.fraction < 1:
            raise UnsupportedError(
                "every, fraction: not available inside a compiled loss; make the HeadDiversity with "
                "every=1 and fraction=1, and call an uncompiled loss without it in between"
            )

    def _reset(self) -> None:
        super()._reset()
        self._recording = Recording()
        self._class_token = ClassTokenShortcut()
        self._finite = FiniteLogits()
        self._blocks = CheckpointedBlocks()
        self._in_graph_step = False  # whether ``dvf.graph_step`` captures this step

    def _options(self) -> dict[str, Any]:
        own = {"_scale": copy(self._scale), "_split": copy(self._split)}
        return {**super()._options(), **own}

    def _moment(self) -> Moment:
        if self._recording.begun:
            self._refuse_other_draws()
        now = {"begun": self._recording.begun, "class_token_only": self._class_token.active}
        return super()._moment()._replace(**now, left_out=self._blocks.left_out)

    def resume(self, moment: Moment) -> None:
        super().resume(moment)
        self._recording = Recording(resumed=moment.begun)
        self._class_token.active = moment.class_token_only
        self._blocks.left_out = moment.left_out

    def forget(self) -> None:
        super().forget()
        self._recording, self._class_token.active = Recording(), False
        self._blocks.running = False

    def _wrap_all(self) -> None:
        """Also wrap the model (its batch size, its class-token shortcut) and the blocks to be split."""
        super()._wrap_all()
        self._class_token.wrap(self, self.layers[-1], self._capturing, self._unseen_finish)
        for block in blocks_from(self.model, self.layers[0]):
            options = self._runs_alone, lambda: self._recording, self._copy
            self.wrap(block, self._blocks.wrapper_of(block, *options))
        self.wrap(blocks_from(self.model, self.layers[0])[0], self._note_inputs)
        self.wrap(self.model, self._note_batch)
        if self._split.fraction < 1:
            for block in blocks_from(self.model, self.layers[0]):
                self.wrap(block, self._split.wrapper_of(block))

    def _unseen_finish(self) -> Callable[[int], None] | None:
        """What notes a run of the last layer, given its tokens; None if more is needed than its projection.

        What a checkpoint recomputes may end where the model's forward does not.
        """
        recomputed = self._resumed is not None or in_checkpoint() or self._blocks.running
        if recomputed or self.wrt == "output" or self._split.fraction < 1:
            return None
        return lambda tokens: self._recording.finish_layer(self.layers[-1], tokens, None)

    def _runs_alone(self) -> bool:
        """Whether a block that runs now belongs to the penalty, and no other context sees it."""
        wanted = self.checkpoint_blocks and self.fraction == 1 and self._capturing()
        return wanted and open_attachments() == [self]

    def _copy(self) -> Callable[[], AbstractContextManager[Recording]]:
        """What enters a copy of the ``with`` block as it is now, and gives what the copy records."""
        enter = self.recomputation()

        @contextmanager
        def inside() -> Iterator[Recording]:
            with paused(), enter() as copied:
                copied._blocks.running = True
                yield copied._recording

        return inside

    def _note_inputs(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        self._recording.note_inputs((*args, *kwargs.values()))
        return forward(*args, **kwargs)

    def _note_batch(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        self._recording.batches.append(batch_size(args, kwargs))
        return forward(*args, **kwargs)


def _of_run(
    scale: float, kind: tuple[str, str], grads: HeadGradients, run: Captured
) -> tuple[Tensor, Tensor]:
    """``layer_penalty`` for blocks, which may not lead to the context."""
    return layer_penalty(grads, run, *kind, scale)
