"""What a backend implements: per operator a protocol of functions, and the operands of its backward passes.

A backward or double backward takes its operands as one named tuple. Its fields are written here and nowhere else:
the ``torch.library`` operator takes its schema from them, and backends pick what they read.

Letters and shapes are those of ``kernels/README.md``; ``None`` stands for an absent tensor or a zero cotangent.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

QKV = tuple[Tensor, Tensor, Tensor]


class AttentionBackward(NamedTuple):
    """Operands of (3)-(5)."""

    q: Tensor  # [B, H, Nq, d]
    k: Tensor  # [B, Hkv, Nk, d], H a multiple of Hkv
    v: Tensor  # [B, Hkv, Nk, dv]
    mask: (
        Tensor | None
    )  # [B | 1, H | 1, Nq | 1, Nk | 1], bool (True: attend) or added to the scores
    seed: Tensor | None  # int64 [1], of the weights that dropout keeps, (55); None: no dropout
    o: Tensor  # [B, H, Nq, dv]
    softmax: Tensor  # [B, H, 2, Nq], (1a)
    do: Tensor  # like o
    is_causal: bool
    scale: float
    dropout_p: float  # 0 without a seed
    mask_grad: bool


class AttentionDoubleBackward(NamedTuple):
    """Operands of (6)-(9): those of the backward, its result dq, and the cotangents of its results."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seed: Tensor | None
    o: Tensor
    softmax: Tensor
    do: Tensor
    dq: Tensor | None  # None: a kernel that reads it computes it again
    ddq: Tensor | None
    ddk: Tensor | None
    ddv: Tensor | None
    ddmask: Tensor | None
    is_causal: bool
    scale: float
    dropout_p: float
    mask_grad: bool


class AttentionKernels(Protocol):
    """``into``: where to write the gradients of q, k and v, views of one tensor."""

    def attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        is_causal: bool,
        scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        """o and the softmax's statistics."""
        ...

    def attention_backward(
        self, inputs: AttentionBackward, into: QKV | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv, dmask."""
        ...

    def attention_double_backward(
        self, inputs: AttentionDoubleBackward, into: QKV | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """gq, gk, gv, gdo, gmask."""
        ...

    def attention_empty_qkv(self, qkv: Tensor, queries: int) -> Tensor:
        """Dense, of the shape of qkv [B, N, 3, H, d]: what ``into`` are views of.

        Uninitialised, but for zeros in the part of q from token ``queries`` on, which ``into`` leaves out.
        """
        ...


class LayerNormBackward(NamedTuple):
    """Operands of (14)."""

    x: Tensor  # [*lead, *normalized]
    weight: Tensor | None  # [*normalized]
    mean: Tensor  # [*lead]
    rstd: Tensor  # [*lead]
    dy: Tensor  # like x
    axes: int  # how many axes are normalized, the last ones
    weight_grad: bool
    bias_grad: bool


class LayerNormDoubleBackward(NamedTuple):
    """Operands of (15)-(19)."""

    x: Tensor
    weight: Tensor | None
    mean: Tensor
    rstd: Tensor
    dy: Tensor
    ddx: Tensor | None
    ddw: Tensor | None
    ddb: Tensor | None
    axes: int
    weight_grad: bool


class LayerNormKernels(Protocol):
    def layer_norm_forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean, rstd."""
        ...

    def layer_norm_backward(
        self, inputs: LayerNormBackward
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """dx, dw, db."""
        ...

    def layer_norm_double_backward(
        self, inputs: LayerNormDoubleBackward
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """gx (None without ddx and ddw), gw (None without ddx), gdy."""
        ...


class GeluBackward(NamedTuple):
    """Operands of dx in (26); tensors of one shape."""

    x: Tensor
    dy: Tensor
    approximate: str


class GeluDoubleBackward(NamedTuple):
    """Operands of gx and gdy in (26)."""

    x: Tensor
    dy: Tensor
    ddx: Tensor
    approximate: str


class GeluKernels(Protocol):
    def gelu_forward(self, x: Tensor, approximate: str) -> Tensor:
        """y."""
        ...

    def gelu_backward(self, inputs: GeluBackward) -> Tensor:
        """dx."""
        ...

    def gelu_double_backward(self, inputs: GeluDoubleBackward) -> tuple[Tensor, Tensor]:
        """gx, gdy."""
        ...


class HeadPenaltyBackward(NamedTuple):
    """Operands of (33)-(35)."""

    grads: Tensor  # [B, H, N, E]
    cosines: Tensor  # [B, N, H, H] by token, [B, H, H] by sample
    norms: Tensor  # [B, N, H] or [B, H], clamped
    dpenalty: Tensor | None  # a scalar
    dcosines: Tensor | None  # like cosines
    granularity: str
    reduction: str
    eps: float


class HeadPenaltyDoubleBackward(NamedTuple):
    """Operands of (36)-(39)."""

    grads: Tensor
    cosines: Tensor
    norms: Tensor
    dpenalty: Tensor | None
    dcosines: Tensor | None
    ddgrads: Tensor
    granularity: str
    reduction: str
    eps: float


class HeadPenaltyKernels(Protocol):
    def head_penalty_forward(
        self, grads: Tensor, granularity: str, reduction: str, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The penalty, cosines, norms."""
        ...

    def head_penalty_backward(self, inputs: HeadPenaltyBackward) -> Tensor:
        """dgrads."""
        ...

    def head_penalty_double_backward(
        self, inputs: HeadPenaltyDoubleBackward
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """ggrads; gdpenalty and gdcosines, None without the cotangent they belong to."""
        ...


class RoutedHeadPenaltyBackward(NamedTuple):
    """Operands of (42)."""

    grad_qkv: Tensor  # [B, N, 3, H, d]
    weight: Tensor  # [3, H, d, D]
    cosines: Tensor
    norms: Tensor
    dpenalty: Tensor | None
    dcosines: Tensor | None
    granularity: str
    reduction: str
    eps: float


class RoutedHeadPenaltyDoubleBackward(NamedTuple):
    """Operands of (43)-(45)."""

    grad_qkv: Tensor
    weight: Tensor
    cosines: Tensor
    norms: Tensor
    dpenalty: Tensor | None
    dcosines: Tensor | None
    ddgrad_qkv: Tensor | None
    ddweight: Tensor | None
    granularity: str
    reduction: str
    eps: float


class RoutedHeadPenaltyKernels(Protocol):
    def routed_head_penalty_forward(
        self, grad_qkv: Tensor, weight: Tensor, granularity: str, reduction: str, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The penalty, cosines, norms."""
        ...

    def routed_head_penalty_backward(
        self, inputs: RoutedHeadPenaltyBackward
    ) -> tuple[Tensor, Tensor]:
        """dgrad_qkv, dweight."""
        ...

    def routed_head_penalty_double_backward(
        self, inputs: RoutedHeadPenaltyDoubleBackward
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """ggrad_qkv, gweight; gdpenalty and gdcosines, None without the cotangent they belong to."""
        ...
