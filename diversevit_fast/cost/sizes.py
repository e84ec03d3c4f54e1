"""How the cost of a step grows: the same step of a model of timm at other widths, depths, images and batches."""

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import UnsupportedError, require, usage_error
from .predict import Cost, check_batch, cost

ERM = "erm"
AXES = ("width", "depth", "tokens", "batch")
FACTORS = (0.25, 0.5, 1.0, 2.0)


class Sized(NamedTuple):
    """The cost of a step at one size.

    Attributes:
        axis: what differs from the model as it is, one of ``AXES``.
        size: of that axis: model width, layers, tokens with the class token, samples.
        step: its name among those that were asked for.
        cost: what it costs.
    """

    axis: str
    size: int
    step: str
    cost: Cost


def cost_by_size(
    model: str,
    steps: Mapping[str, Any],
    *,
    batch: int,
    axes: Sequence[str] = AXES,
    factors: Sequence[float] = FACTORS,
    **options: Any,
) -> list[Sized]:
    """Predict steps of a vision transformer of timm whose width, depth, images or batch are some times as large.

    Width grows by heads of the same width, at least two; tokens by larger images of the same patches. A ViT-B takes
    about a minute of one core.

    Args:
        model: a name of timm's whose model takes ``embed_dim``, ``depth``, ``num_heads`` and ``img_size``.
        steps: name -> a step's ``diversity``, as ``cost`` takes it; ``None`` for no penalty.
        batch: samples of a step; varied too.
        axes: which sizes are varied, one at a time, of ``AXES``.
        factors: how many times as large; sizes are rounded, and those that meet are taken once.
        options: of ``cost``: dtype, device, and so on.

    Returns:
        By axis, size and step, in this order.

    Raises:
        UsageError: a wrong argument, or a size beyond what any machine can address.
        UnsupportedError: the model does not take other sizes.
    """
    check_batch(batch)
    if not steps:
        raise usage_error("steps", "at least one step", "none", "say {'erm': None}")
    for axis in axes:
        if axis not in AXES:
            raise usage_error("axes", f"some of {', '.join(AXES)}", reprlib.repr(axis), "mend it")
    for factor in factors:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 64:
            wanted = "numbers above 0, of at most 64"
            raise usage_error("factors", wanted, reprlib.repr(factor), "say (0.5, 1, 2)")
    base, found = _base_of(model), []
    known: dict[tuple[Any, ...], Cost] = {}
    for axis in axes:
        taken = set()
        for factor in sorted(factors):
            sizes, samples = _grown(base, axis, factor), batch
            if axis == "batch":
                samples = max(1, round(batch * factor))
            made = _made(model, sizes)
            size = {**sizes, "width": sizes["embed_dim"], "tokens": _tokens(made)}
            size["batch"] = samples
            if size[axis] in taken:
                continue
            taken.add(size[axis])
            for name, diversity in steps.items():
                key = (*sizes.values(), samples, name)
                if key not in known:
                    known[key] = cost(made, diversity, batch=samples, **options)
                found.append(Sized(axis, size[axis], name, known[key]))
    return found


def over_erm(found: Iterable[Sized]) -> dict[tuple[str, str], dict[int, float]]:
    """How many times what a step without penalty costs, by axis and step, at each size.

    Of predicted seconds; where no machine's rates are known, of FLOPs.

    Raises:
        UsageError: none of the steps is named ``"erm"``.
    """
    found = list(found)
    plain = {(one.axis, one.size): _amount(one.cost) for one in found if one.step == ERM}
    ratios: dict[tuple[str, str], dict[int, float]] = {}
    for one in found:
        if (one.axis, one.size) not in plain:
            raise usage_error("steps", "one named erm", one.step, "say {'erm': None, ...}")
        ratio = _amount(one.cost) / plain[one.axis, one.size]
        ratios.setdefault((one.axis, one.step), {})[one.size] = ratio
    return ratios


def _amount(found: Cost) -> float:
    seconds = found.seconds
    return sum(found.flops.values()) if seconds is None else seconds.step


class _Base(NamedTuple):
    sizes: dict[str, int]  # embed_dim, depth, num_heads, img_size
    patch: int


def _base_of(model: str) -> _Base:
    """The sizes of a model of timm as it is."""
    timm: Any = require("timm", extra="train")
    if not isinstance(model, str) or not timm.is_model(model.partition(".")[0]):
        hint = "timm.list_models('vit*') lists them"
        raise usage_error("model", "a name of timm's", reprlib.repr(model), hint)
    made = _made(model, {})
    try:
        sizes = {
            "embed_dim": int(made.embed_dim),
            "depth": len(made.blocks),
            "num_heads": int(made.blocks[0].attn.num_heads),
            "img_size": int(made.patch_embed.img_size[0]),
        }
        return _Base(sizes, int(made.patch_embed.patch_size[0]))
    except (AttributeError, TypeError, IndexError):
        raise _other_sizes(model) from None


def _grown(base: _Base, axis: str, factor: float) -> dict[str, int]:
    sizes = dict(base.sizes)
    if axis == "width" and factor != 1:
        heads = max(2, round(sizes["num_heads"] * factor))
        width = sizes["embed_dim"] // sizes["num_heads"]
        sizes |= {"num_heads": heads, "embed_dim": heads * width}
    elif axis == "depth":
        sizes["depth"] = max(1, round(sizes["depth"] * factor))
    elif axis == "tokens":
        side = sizes["img_size"] / base.patch * math.sqrt(factor)
        sizes["img_size"] = base.patch * max(1, round(side))
    return sizes


def _made(model: str, sizes: Mapping[str, int]) -> Any:
    timm: Any = require("timm", extra="train")
    try:
        with torch.device("meta"):
            return timm.create_model(model, **sizes)
    except (TypeError, RuntimeError, AssertionError):
        raise _other_sizes(model) from None


def _tokens(model: Any) -> int:
    return int(model.patch_embed.num_patches) + int(getattr(model, "num_prefix_tokens", 0))


def _other_sizes(model: str) -> UnsupportedError:
    return UnsupportedError(
        f"model: {model} does not take embed_dim, depth, num_heads and img_size; vary another vision transformer of "
        "timm, or call cost with models of your own"
    )
