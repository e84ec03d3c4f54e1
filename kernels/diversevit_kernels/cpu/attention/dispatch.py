"""Attention on a CPU, (1)-(9) of kernels/README.md: which path computes the forward and the two backward passes.

C++         ``native``, where there is a C++ compiler.
PyTorch     ``blocked``, elsewhere.

Shapes      q, o, do [B, H, Nq, .]; k, v [B, Hkv, Nk, .], H a multiple of Hkv; mask [B|1, H|1, Nq|1, Nk|1], bool
            (True: attend) or additive; the softmax's statistics (1a) [B, H, 2, Nq]: the largest score and the share.
Dtypes      any floating; statistics in float32 (float64 for float64).
Results     laid out as [B, N, H, .], which is what a projection reads.
Not read    ``o``, since delta is computed from P and dP (see ``blocked``), and ``dq``.
"""

from torch import Tensor

from ...common.contracts import QKV, AttentionBackward, AttentionDoubleBackward
from ...common.dtypes import accumulation_dtype
from ..runtime.allocator import new_empty, new_empty_heads
from . import blocked, native
from .inputs import Inputs


def attention_empty_qkv(qkv: Tensor, queries: int) -> Tensor:
    """Allocate a contiguous tensor like ``qkv`` [B, N, 3, H, d], of which ``into`` may be views; see the contract."""
    made = new_empty(qkv, *qkv.shape)
    if queries < qkv.shape[1]:
        made[:, queries:, 0].zero_()
    return made


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(1)-(2): the output ``[B, H, Nq, dv]`` and the softmax's statistics ``[B, H, 2, Nq]``."""
    inputs = Inputs(q, k, v, mask, seed, is_causal, scale, dropout_p)
    o = new_empty_heads(q, v.shape[-1])
    B, H, Nq, _ = q.shape
    softmax = q.new_empty(B, H, 2, Nq, dtype=accumulation_dtype(q.dtype))
    if native.supports(q):
        native.call("forward", inputs, softmax, o=o)
    else:
        blocked.forward(inputs, softmax, o)
    return o, softmax


def attention_backward(
    inputs: AttentionBackward, into: QKV | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(3)-(5): ``dq``, ``dk``, ``dv`` like q, k, v, and ``dmask`` like the mask if ``mask_grad``.

    ``into``: where to write the first three.
    """
    q, k, v, mask, seed, _, softmax, do, is_causal, scale, dropout_p, mask_grad = inputs
    problem = Inputs(q, k, v, mask, seed, is_causal, scale, dropout_p)
    dq, dk, dv = into or (new_empty_heads(x, x.shape[-1]) for x in (q, k, v))
    if native.supports(q):
        results = {"gq": dq, "gk": dk, "gv": dv}
        dmask = native.call("backward", problem, softmax, mask_grad=mask_grad, do=do, **results)
    else:
        dmask = blocked.backward(problem, softmax, do, (dq, dk, dv), mask_grad)
    return dq, dk, dv, dmask


def attention_double_backward(
    inputs: AttentionDoubleBackward, into: QKV | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(6)-(9): ``gq``, ``gk``, ``gv``, ``gdo``, and ``gmask`` if ``mask_grad``.

    An absent cotangent costs nothing: its products and their buffers are left out.
    ``into``: where to write the first three.
    """
    q, k, v, mask, seed, _, softmax, do, _, ddq, ddk, ddv, ddmask = inputs[:13]
    is_causal, scale, dropout_p, mask_grad = inputs[13:]
    problem = Inputs(q, k, v, mask, seed, is_causal, scale, dropout_p)
    gq, gk, gv = into or (new_empty_heads(x, x.shape[-1]) for x in (q, k, v))
    gdo = new_empty_heads(do, do.shape[-1])
    if native.supports(q):
        tensors = {"do": do, "ddq": ddq, "ddk": ddk, "ddv": ddv}
        tensors |= {"gq": gq, "gk": gk, "gv": gv, "gdo": gdo}
        gmask = native.call("double_backward", problem, softmax, ddmask, mask_grad, **tensors)
    else:
        cotangents, results = (ddq, ddk, ddv, ddmask), (gq, gk, gv, gdo)
        gmask = blocked.double_backward(problem, softmax, do, cotangents, results, mask_grad)
    return gq, gk, gv, gdo, gmask
