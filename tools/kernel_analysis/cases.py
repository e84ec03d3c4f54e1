"""The calls that the compile report compiles: every operator's host functions at sizes of vision transformers.

Tensors are on the meta device, laid out as in a model: q, k, v are views of one qkv projection, outputs
and their cotangents are laid out as [B, N, H, d]. Every head width gets the plain case, short (50 and 197 tokens: all
keys in one tile) and long (1025: streamed); everything else is compiled at head width 64.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tools.kernel_analysis.compiling import HostCall

OPERATORS = ("attention", "layer_norm", "gelu", "head_penalty", "routed_head_penalty")
WIDTHS = (16, 32, 64, 80, 88, 96, 104, 112, 128, 256)
"""Head widths. Operators without heads are listed at 64."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_B, _H = 8, 12
_SHORT, _LONG = 197, 1025
_FIFTY = 50  # a ViT with patches of 32 pixels: fewer than a tile of 64
_FEW = 17  # keys that a step of a row program holds, though it would walk more
_SIZES = ((_B, _SHORT), (64, _SHORT), (_B, _LONG))
_PLAIN_SIZES = (*_SIZES, (_B, _FIFTY), (64, _FIFTY))
"""Batch and tokens: at a batch of 64 the heads alone fill every chip, which changes the launch choice."""
_BINDING_WIDTH = 128
"""Up to this head width registers and tensor cores are checked; beyond, the kernel must only compile."""

Function = Callable[..., Any]
_Cases = Iterator[tuple[str, str, Callable[[Function], object]]]
"""Triples of order, case and call."""


def host_calls(operator: str, dtype: str, width: int, quick: bool = False) -> list[HostCall]:
    """Return all calls of an operator for one dtype and one head width.

    Operators without heads have their own widths and are listed once, at head width 64.
    """
    d = DTYPES[dtype]
    if operator == "attention":
        return _named(operator, dtype, width, _attention(d, width, quick))
    if operator == "routed_head_penalty":
        return _named(operator, dtype, width, _routed(d, width, quick))
    if width != 64:
        return []
    cases, sizes = _WITHOUT_HEADS[operator]
    chosen = [n for n in sizes if not quick or n in _QUICK_SIZES]
    return [w for n in chosen for w in _named(operator, dtype, n, cases(d, n))]


def _named(operator: str, dtype: str, width: int, cases: _Cases) -> list[HostCall]:
    binding = operator not in ("attention", "routed_head_penalty") or width <= _BINDING_WIDTH
    return [
        HostCall(operator, order, case, dtype, width, call, binding) for order, case, call in cases
    ]


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _by_token(B: int, H: int, N: int, d: int, dtype: torch.dtype) -> Tensor:
    """[B, H, N, d] laid out as [B, N, H, d]."""
    return _empty(B, N, H, d, dtype=dtype).transpose(1, 2)


def _attention(dtype: torch.dtype, d: int, quick: bool) -> _Cases:
    for B, n in _PLAIN_SIZES:
        q, k, v = _projected(B, n, d, dtype)
        yield from _attention_case(f"plain B={B} N={n}", q, k, v)
    if not quick:
        q, k, v = (_empty(_B, _H, _LONG, d, dtype=dtype) for _ in range(3))
        yield from _attention_case(f"dense B={_B} N={_LONG}", q, k, v)
    if d != 64 or (quick and dtype != torch.bfloat16):
        return
    for B, n in _SIZES[:1] if quick else _SIZES:
        q, k, v = _projected(B, n, d, dtype)
        at = f"B={B} N={n}"
        yield from _attention_case(f"causal {at}", q, k, v, is_causal=True)
        keys = _empty(B, 1, 1, n, dtype=torch.bool)
        yield from _attention_case(f"bool mask {at}", q, k, v, mask=keys)
        bias = _empty(1, _H, n, n, dtype=dtype)
        yield from _attention_case(f"additive mask {at}", q, k, v, mask=bias, mask_grad=True)
        yield from _attention_case(f"dropout {at}", q, k, v, dropout_p=0.1)
        if quick:
            continue
        bias = _empty(1, _H, 1, n, dtype=dtype)
        yield from _attention_case(f"bias of keys {at}", q, k, v, mask=bias, mask_grad=True)
        few_k, few_v = (_by_token(B, _H // 3, n, d, dtype) for _ in range(2))
        yield from _attention_case(f"4 key heads {at}", q, few_k, few_v)
        yield from _attention_case(f"class token {at}", q[:, :, :1], k, v)
        yield from _attention_case(f"class token, dropout {at}", q[:, :, :1], k, v, dropout_p=0.1)
        for given in ((True, False, False), (False, True, False), (False, False, True)):
            name = f"only {('ddq', 'ddk', 'ddv')[given.index(True)]} {at}"
            every = _attention_case(name, q, k, v, given=given)
            yield from (case for case in every if case[0] == "double_backward")
    for B, n in ((1, _SHORT), (_B, _FEW)):
        q, k, v = _projected(B, n, d, dtype)
        yield from _attention_case(f"plain B={B} N={n}", q, k, v)


def _projected(B: int, N: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one projection [B, N, 3, H, d]."""
    q, k, v = _empty(B, N, 3, _H, d, dtype=dtype).permute(2, 0, 3, 1, 4)
    return q, k, v


def _attention_case(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    mask_grad: bool = False,
    dropout_p: float = 0.0,
    given: tuple[bool, bool, bool] = (True, True, True),
) -> _Cases:
    """Yield the three orders; ``given`` says which of ddq, ddk, ddv exist."""
    dq, dk, dv = (_by_token(*x.shape, dtype=q.dtype) for x in (q, k, v))
    B, H, n, _ = q.shape
    o = do = _by_token(B, H, n, v.shape[-1], q.dtype)
    softmax = _empty(B, H, 2, n, dtype=torch.float32)
    dd = [x if one else None for x, one in zip((dq, dk, dv), given, strict=True)]
    ddmask = mask if mask_grad else None
    seed = _empty(1, dtype=torch.int64) if dropout_p else None
    options: dict[str, Any] = {"is_causal": is_causal, "scale": q.shape[-1] ** -0.5}
    options["dropout_p"] = dropout_p
    more = {**options, "mask_grad": mask_grad}
    yield "forward", name, lambda f: f(q, k, v, mask, seed, **options)
    yield "backward", name, lambda f: f(q, k, v, mask, seed, o, softmax, do, **more)
    yield (
        *("double_backward", name),
        lambda f: f(q, k, v, mask, seed, o, softmax, do, dq, *dd, ddmask, **more),
    )


def _layer_norm(dtype: torch.dtype, D: int) -> _Cases:
    """Yield calls with parameters in x's dtype, in float32 and without, and without some cotangents."""
    x, row = _empty(_B, _SHORT, D, dtype=dtype), _empty(_B, _SHORT, dtype=torch.float32)
    for kind in dict.fromkeys((dtype, torch.float32)):
        w = _empty(D, dtype=kind)
        name = f"[{_B}, {_SHORT}, {D}] {str(kind).removeprefix('torch.')} parameters"
        yield "forward", name, partial(_call, x, w, w, 1, 1e-6)
        yield "backward", name, partial(_call, x, w, row, row, x, 1, True, True)
        yield "double_backward", name, partial(_call, x, w, row, row, x, x, w, w, 1, True)
    w, name = _empty(D, dtype=dtype), f"[{_B}, {_SHORT}, {D}] without"
    yield "forward", f"{name} parameters", partial(_call, x, None, None, 1, 1e-6)
    yield (
        *("backward", f"{name} parameter gradients"),
        partial(_call, x, w, row, row, x, 1, False, False),
    )
    yield (
        *("double_backward", f"{name} ddw, ddb"),
        partial(_call, x, w, row, row, x, x, None, None, 1, True),
    )


def _gelu(dtype: torch.dtype, D: int) -> _Cases:
    x = _empty(_B, _SHORT, D, dtype=dtype)
    for approximate in ("none", "tanh"):
        name = f"[{_B}, {_SHORT}, {D}] {approximate}"
        yield "forward", name, partial(_call, x, approximate)
        yield "backward", name, partial(_call, x, x, approximate)
        yield "double_backward", name, partial(_call, x, x, x, approximate)


def _call(*args: Any) -> Any:
    """Call the last argument with the others, so that ``partial`` can hold these."""
    return args[-1](*args[:-1])


def _statistics(H: int, granularity: str) -> tuple[Tensor, Tensor]:
    groups = (_B, _SHORT) if granularity == "token" else (_B,)
    return _empty(*groups, H, H, dtype=torch.float32), _empty(*groups, H, dtype=torch.float32)


def _penalty_case(name: str, H: int, granularity: str, x: tuple, ddx: tuple) -> _Cases:
    """Yield the three orders of either penalty; by token also with a gradient of the cosines."""
    c, n = _statistics(H, granularity)
    dp = _empty(dtype=torch.float32)
    dc = c.new_empty(()).expand(c.shape) if granularity == "token" else None  # as a sum's
    after = (granularity, "all", 1e-12)
    yield "forward", name, partial(_call, *x, *after)
    yield "backward", name, partial(_call, *x, c, n, dp, None, *after)
    yield "double_backward", name, partial(_call, *x, c, n, dp, None, *ddx, *after)
    if dc is not None:
        yield "backward", f"{name} dcosines", partial(_call, *x, c, n, dp, dc, *after)
        yield (
            *("double_backward", f"{name} dcosines"),
            partial(_call, *x, c, n, dp, dc, *ddx, *after),
        )


def _head_penalty(dtype: torch.dtype, E: int) -> _Cases:
    for granularity in ("token", "sample"):
        for H in (3, _H, 17, 40):
            x = _by_token(_B, H, _SHORT, E, dtype)
            yield from _penalty_case(f"{granularity} H={H} E={E}", H, granularity, (x,), (x,))


def _routed(dtype: torch.dtype, d: int, quick: bool) -> _Cases:
    for granularity in ("token", "sample") if d == 64 else ("token",):
        for H in (3, _H, 40) if d == 64 and not quick else (_H,):
            r = _empty(_B, _SHORT, 3, H, d, dtype=dtype)
            w = _empty(3, H, d, H * d, dtype=dtype)
            name = f"{granularity} H={H} D={H * d}"
            yield from _penalty_case(name, H, granularity, (r, w), (r, w))
            if d == 64 and not quick:
                c, n = _statistics(H, granularity)
                dp, after = _empty(dtype=torch.float32), (granularity, "all", 1e-12)
                for given, dd in (("ddgrad_qkv", (r, None)), ("ddweight", (None, w))):
                    yield (
                        *("double_backward", f"{name} only {given}"),
                        partial(_call, r, w, c, n, dp, None, *dd, *after),
                    )


_WITHOUT_HEADS: dict[str, tuple[Callable[[torch.dtype, int], _Cases], tuple[int, ...]]] = {
    "layer_norm": (_layer_norm, (384, 768, 1280)),
    "gelu": (_gelu, (3072,)),
    "head_penalty": (_head_penalty, (768,)),
}
"""Operators whose width is not a head's: cases and widths."""
_QUICK_SIZES = (768, 3072)
