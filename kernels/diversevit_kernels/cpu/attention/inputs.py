"""The arguments that forward, backward and double backward of attention share."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """What attention is computed from."""

    q: Tensor  # [B, H, Nq, d]
    k: Tensor  # [B, Hkv, Nk, d], H a multiple of Hkv
    v: Tensor  # [B, Hkv, Nk, dv]
    mask: Tensor | None  # [B or 1, H or 1, Nq or 1, Nk or 1], bool (True: attend) or additive
    seed: Tensor | None  # int64 [1], of the weights that dropout keeps; None: all
    is_causal: bool
    scale: float
    dropout_p: float
