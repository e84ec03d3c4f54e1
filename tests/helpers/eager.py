"""The penalty by its definition, for any library's model: composite attention and one VJP per head.

Nothing here goes through the library's attachment: attention is the softmax formula, the layer's input is
replaced by a pre-hook, and u_h = (do_h/du)^T g_h is asked of autograd for each head by itself.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diversevit_fast.ops import reference
from diversevit_kernels.common.dropout import kept_by


def softmax_attention(q, k, v, mask=None, causal=False, scale=None, dropout_p=0.0) -> Tensor:
    """Attention by the formula; its dropout has the bits of ``dvf.attention``, from the same generator."""
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    weights = scores.softmax(-1)
    if dropout_p:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
        weights = weights * kept_by(seed, weights.shape, dropout_p) / (1 - dropout_p)
    return weights @ v


class Eager(TorchFunctionMode):
    """Runs every attention call by formula; of one module keeps the input and the head outputs."""

    def __init__(self, module: nn.Module | None = None, scale: Tensor | None = None):
        super().__init__()
        self.module, self.scale, self.inside = module, scale, False
        self.inputs, self.heads = [], []

    def __enter__(self):
        if self.module is not None:
            entered = self.module.register_forward_pre_hook(self._enter, with_kwargs=True)
            left = self.module.register_forward_hook(self._leave)
            self.hooks = [entered, left]
            self.fused = getattr(self.module, "fused_attn", None)
            self.module.fused_attn = True
        parallel = getattr(self.module, "in_proj", None)
        if parallel is not None:
            self.hooks.append(parallel.register_forward_pre_hook(self._only_input))
        return super().__enter__()

    def __exit__(self, *exception):
        for hook in self.hooks if self.module is not None else ():
            hook.remove()
        if self.module is not None:
            del self.module.fused_attn
            if self.fused is not None:
                self.module.fused_attn = self.fused
        return super().__exit__(*exception)

    def _enter(self, module, args, kwargs):
        self.inside = True
        if hasattr(module, "in_proj"):  # the block's input is also its residual
            return None
        source = (
            args[1]
            if isinstance(module, nn.MultiheadAttention)
            else (args or (kwargs["hidden_states"],))[0]
        )
        fresh = self._fresh(source)
        args = tuple(fresh if x is source else x for x in args)
        return args, {name: fresh if x is source else x for name, x in kwargs.items()}

    def _only_input(self, module, args):
        return (self._fresh(args[0]),)

    def _fresh(self, source):
        fresh = source * 1 if source.requires_grad else source.detach().requires_grad_()
        self.inputs.append(fresh)
        return fresh

    def _leave(self, *_):
        self.inside = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_
    ):
        heads = softmax_attention(query, key, value, attn_mask, is_causal, scale, dropout_p)
        if self.inside:
            if self.scale is not None:
                heads = heads * self.scale[:, None, None]
            self.heads.append(heads)
        return heads

    def _multi_head(self, query, key, value, size, heads, weight, bias, *rest, **options):
        """[N, B, D], without masks."""
        assert options.get("attn_mask") is None
        assert options.get("key_padding_mask") is None
        out_weight, out_bias = rest[4], rest[5]
        if options.get("use_separate_proj_weight"):
            weights = [options[f"{r}_proj_weight"] for r in "qkv"]
        else:
            weights = weight.chunk(3)
        biases = bias.chunk(3)
        parts = (
            F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in parts)
        o = self._attend(q, k, v, dropout_p=rest[3] if options["training"] else 0.0)
        return F.linear(o.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None


def eager_penalty(
    model, images, module, wrt, logits_of=lambda out: out, granularity="token", eager=Eager
):
    """Logits and the penalty of one attention module."""
    with eager(module) as seen:
        logits = logits_of(model(images))
    (heads,), (source,) = seen.heads, seen.inputs
    (g,) = torch.autograd.grad(logits.max(-1).values.sum(), heads, create_graph=True)
    if wrt == "output":
        return logits, reference.head_penalty(g, granularity)[0]
    mask = torch.eye(heads.shape[1], dtype=g.dtype)[:, None, :, None, None]
    each = [
        torch.autograd.grad(heads, source, g * alone, create_graph=True)[0].flatten(1, -2)
        for alone in mask
    ]
    return logits, reference.head_penalty(torch.stack(each, 1), granularity)[0]
