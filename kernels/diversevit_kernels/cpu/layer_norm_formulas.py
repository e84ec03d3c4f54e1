"""LayerNorm's derivatives on a CPU as formulas that Inductor compiles: (13)-(19) of kernels/README.md.

Sums over a row and sums over all rows are formulas of their own: together they would keep a [rows, width] tensor
between them, which costs more than reading the operands twice.

Shapes   x, dy, a (= ddx) [rows, width]; mean, rstd [rows, 1]; w, ddw, ddb [width], ones or zeros where absent.
Dtypes   x, dy, a in one dtype, the rest in float32; arithmetic in float32.
"""

import torch
from torch import Tensor

from .inductor import Formula, Function, compiled_if_worth


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(mean.dtype) - mean) * rstd


def _jacobian(z: Tensor, xh: Tensor, rstd: Tensor) -> Tensor:
    """(13): J z."""
    return (z - z.mean(1, keepdim=True) - xh * (z * xh).mean(1, keepdim=True)) * rstd


def _backward_rows(
    x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor, w: Tensor
) -> tuple[Tensor, ...]:
    """(14): ``dx``."""
    dx = _jacobian(dy.to(mean.dtype) * w, _normalized(x, mean, rstd), rstd)
    return (dx.to(x.dtype),)


def _backward_columns(x: Tensor, dy: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """(14): ``dw``, ``db``."""
    dy = dy.to(mean.dtype)
    return (dy * _normalized(x, mean, rstd)).sum(0), dy.sum(0)


def _double_backward_rows(
    x: Tensor,
    dy: Tensor,
    a: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor,
    ddw: Tensor,
    ddb: Tensor,
) -> tuple[Tensor, ...]:
    """(15)-(18): ``gx``, ``gdy``."""
    xh = _normalized(x, mean, rstd)
    a, dy = a.to(mean.dtype), dy.to(mean.dtype)
    s, g = _jacobian(a, xh, rstd), dy * w
    a2, c2 = (a * xh).mean(1, keepdim=True), (g * xh).mean(1, keepdim=True)
    h = dy * ddw - (a * c2 + g * a2) * rstd
    gx = _jacobian(h, xh, rstd) - xh * (rstd * (g * s).mean(1, keepdim=True))
    return gx.to(x.dtype), (s * w + xh * ddw + ddb).to(x.dtype)


def _double_backward_columns(
    x: Tensor, dy: Tensor, a: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, ...]:
    """(19): ``gw``."""
    s = _jacobian(a.to(mean.dtype), _normalized(x, mean, rstd), rstd)
    return ((dy.to(mean.dtype) * s).sum(0),)


_TILE, _STATISTIC, _ROW = ("rows", "width"), ("rows", None), ("width",)


def _formula(name: str, function: Function, *free: tuple[str | None, ...]) -> Formula:
    sizes = {"rows": 6, "width": 40, None: 1}

    def examples(dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = [tuple(sizes[axis] for axis in axes) for axes in free]
        kinds = [dtype if axes is _TILE else torch.float32 for axes in free]
        return tuple(torch.ones(n, dtype=kind) for n, kind in zip(shapes, kinds, strict=True))

    return Formula(f"layer_norm_{name}", function, examples, free)


_STATISTICS = (_STATISTIC, _STATISTIC)
BACKWARD_ROWS = _formula("backward_rows", _backward_rows, _TILE, _TILE, *_STATISTICS, _ROW)
BACKWARD_COLUMNS = _formula("backward_columns", _backward_columns, _TILE, _TILE, *_STATISTICS)
DOUBLE_BACKWARD_ROWS = _formula(
    "double_backward_rows", _double_backward_rows, *3 * (_TILE,), *_STATISTICS, *3 * (_ROW,)
)
DOUBLE_BACKWARD_COLUMNS = _formula(
    "double_backward_columns", _double_backward_columns, *3 * (_TILE,), *_STATISTICS
)


def fused(formula: Formula, x: Tensor) -> Function | None:
    """The compiled formula for x [rows, width], if there is one and it is worth it."""
    compilable = min(x.shape) > 1  # sizes of 1 are not compiled for
    return compiled_if_worth(formula, x.dtype, x.numel()) if compilable else None


def columns(formula: Formula, *tiles: Tensor) -> tuple[Tensor, ...]:
    """Sums over all rows of x, the first of ``tiles``; where not compiled, operator by operator."""
    return (fused(formula, tiles[0]) or formula.function)(*tiles)
