"""The work of attention on a CPU, as both paths of ``dispatch`` do it: C++ and PyTorch compute the same products.

Every order computes the scores again. A product of a block of queries with all keys costs 2 Nq Nk d a head; under a
causal mask a block sees the keys up to its last query, here counted as those on and below the diagonal.
"""

from torch import Tensor

from ...common.contracts import AttentionBackward, AttentionDoubleBackward
from ...common.dtypes import accumulation_dtype
from ...common.work import SCORE_OPERATIONS, Work

_TILE_BYTES = 1 << 20  # of all tiles of a block, csrc/attention.cpp


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> Work:
    """(1)-(2): S and O."""
    pairs = _pairs(q, k, is_causal)
    return _work(q, k, v, pairs, (1, 1), "forward", sums=False)


def attention_backward(inputs: AttentionBackward) -> Work:
    """(3)-(5): S, dQ, dK; dP, dV."""
    q, k, v = inputs[:3]
    pairs = _pairs(q, k, inputs.is_causal)
    return _work(q, k, v, pairs, (3, 2), "backward", sums=True)


def attention_double_backward(inputs: AttentionDoubleBackward) -> Work:
    """(6)-(9): S, gQ, gK, dP; those of the cotangents that are there, and of what they reach."""
    q, k, v = inputs[:3]
    pairs = _pairs(q, k, inputs.is_causal)
    of_q, of_k, of_v = (x is not None for x in (inputs.ddq, inputs.ddk, inputs.ddv))
    any_dds = of_q or of_k or inputs.ddmask is not None
    wide = 3 + 2 * of_q + 2 * of_k  # over d: ddS and gK of ddq, ddS and gQ of ddk
    values = (
        1 + any_dds + 1 + 2 * of_v
    )  # over dv: dP; gV; gdO of ddS, which is zero without it; Y and gdO of ddv
    return _work(q, k, v, pairs, (wide, values), "double_backward", sums=True)


def _work(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: int,
    products: tuple[int, int],
    order: str,
    sums: bool,
) -> Work:
    """The work of so many products over d and over dv.

    Args:
        sums: whether the gradients of a head's keys and values are summed in scratch memory.
    """
    d, dv = q.shape[-1], v.shape[-1]
    wide, values = products
    keys = k.shape[2] * (d + dv) * (accumulation_dtype(q.dtype).itemsize * (1 + sums))
    return Work(
        products=2 * pairs * (wide * d + values * dv),
        elementwise=SCORE_OPERATIONS[order] * pairs,
        workspace=_TILE_BYTES + keys,
    )


def _pairs(q: Tensor, k: Tensor, is_causal: bool) -> int:
    """Pairs of a query and a key that it may see, of all samples and heads."""
    B, H, Nq, _ = q.shape
    Nk = k.shape[2]
    seen = sum(min(Nk, i + 1) for i in range(Nq)) if is_causal else Nq * Nk
    return B * H * seen
