"""Each stage's three rungs as data: what they take and what they return; the eager formula is ``providers``'.

Arguments go by name, so a backend's functions may take more or fewer of them than another's.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.registry import eager_of

RUNGS = {"d0": "forward", "d1": "backward", "d2": "double_backward"}
HEADS, WIDTH, MODEL, HIDDEN = 6, 64, 384, 1536
"""Of the stages that are not counted per head: ViT-S."""


@dataclass(frozen=True)
class Stage:
    """One stage on one sample (attention: one head of one sample) of ``N`` tokens."""

    inputs: Mapping[str, tuple[int | str, ...]]  # differentiable arguments; "N" is the token count
    constants: Mapping[str, Any]  # the rest
    results: Mapping[str, tuple[str, ...]]  # rung -> names of what it returns
    cotangents: Mapping[str, str]  # cotangent -> the result it belongs to
    most_tokens: int | None = None  # how many the interpreter can count in two minutes

    def values(self, tokens: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        """Random inputs, and the constants."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
        shapes = {
            name: tuple(tokens if n == "N" else int(n) for n in shape)
            for name, shape in self.inputs.items()
        }
        tensors = {
            name: torch.randn(shape, generator=generator, device=device).to(dtype)
            for name, shape in shapes.items()
        }
        return {**tensors, **self.constants}


_KIND = {"granularity": "token", "reduction": "all", "eps": 1e-12, "dcosines": None}

STAGES: dict[str, Stage] = {
    "attention": Stage(
        inputs=dict.fromkeys("qkv", (1, 1, "N", WIDTH)),
        constants={
            **{"mask": None, "ddmask": None},
            **{"is_causal": False, "scale": WIDTH**-0.5, "mask_grad": False},
        },
        results={
            "d0": ("o", "softmax"),
            "d1": ("dq", "dk", "dv", "dmask"),
            "d2": ("gq", "gk", "gv", "gdo", "gmask"),
        },
        cotangents={"do": "o", "ddq": "dq", "ddk": "dk", "ddv": "dv"},
    ),
    "layer_norm": Stage(
        inputs={"x": (1, "N", MODEL), "weight": (MODEL,), "bias": (MODEL,)},
        constants={"axes": 1, "eps": 1e-5, "weight_grad": True, "bias_grad": True},
        results={
            "d0": ("y", "mean", "rstd"),
            "d1": ("dx", "dw", "db"),
            "d2": ("gx", "gw", "gdy"),
        },
        cotangents={"dy": "y", "ddx": "dx", "ddw": "dw", "ddb": "db"},
    ),
    "gelu": Stage(
        inputs={"x": (1, "N", HIDDEN)},
        constants={"approximate": "none"},
        results={"d0": ("y",), "d1": ("dx",), "d2": ("gx", "gdy")},
        cotangents={"dy": "y", "ddx": "dx"},
    ),
    "head_penalty": Stage(
        inputs={"grads": (1, HEADS, "N", MODEL)},
        constants=_KIND,
        results={
            "d0": ("penalty", "cosines", "norms"),
            "d1": ("dgrads",),
            "d2": ("ggrads", "gdpenalty", "gdcosines"),
        },
        cotangents={"dpenalty": "penalty", "ddgrads": "dgrads"},
    ),
    "routed_head_penalty": Stage(
        inputs={"grad_qkv": (1, "N", 3, HEADS, WIDTH), "weight": (3, HEADS, WIDTH, MODEL)},
        constants=_KIND,
        results={
            "d0": ("penalty", "cosines", "norms"),
            "d1": ("dgrad_qkv", "dweight"),
            "d2": ("ggrad_qkv", "gweight", "gdpenalty", "gdcosines"),
        },
        cotangents={"dpenalty": "penalty", "ddgrad_qkv": "dgrad_qkv", "ddweight": "dweight"},
        most_tokens=17,
    ),
}


def folder(name: str) -> str:
    """The folder of an operator in a backend."""
    return "head_penalty" if name == "routed_head_penalty" else name


def missing(name: str) -> str | None:
    """Why the stage has no Triton kernels to look at, if it has none."""
    module = f"diversevit_kernels.triton.{folder(name)}"
    if find_spec(module) is None:
        return f"{name}: no module {module}"
    try:
        functions = import_module(module)
    except ImportError as error:
        return f"{name}: {error}"
    absent = [rung for rung in RUNGS.values() if not hasattr(functions, f"{name}_{rung}")]
    return f"{name}: no {absent[0]} in {module}" if absent else None


def climb(
    name: str, values: dict[str, Any], around: Callable[[str, Callable[[], Any]], Any]
) -> None:
    """Run the Triton rungs d0, d1, d2 in order on ``values``, which collects what they return.

    Args:
        around: called with the order and a function that runs the rung; returns what that returns.
    """
    stage, module = STAGES[name], import_module(f"diversevit_kernels.triton.{folder(name)}")
    for order, rung in RUNGS.items():
        function = getattr(module, f"{name}_{rung}")
        wanted = inspect.signature(function).parameters
        absent = [p for p in wanted if p not in values and wanted[p].default is inspect._empty]
        if absent:
            raise TypeError(
                f"{name}_{rung}: tools/kernel_analysis/operators.py has no value for {absent[0]}"
            )
        arguments = {p: values[p] for p in wanted if p in values}
        returned = around(order, lambda f=function, given=arguments: f(**given))
        returned = returned if isinstance(returned, tuple) else (returned,)
        values |= dict(zip(stage.results[order], returned, strict=False))
        for cotangent, of in stage.cotangents.items():
            if cotangent not in values and values.get(of) is not None:
                values[cotangent] = torch.randn_like(values[of])


def climb_eagerly(name: str, tokens: int, dtype: torch.dtype, done: Callable[[str], None]) -> None:
    """The same three orders by autograd through the eager formula; ``done`` is told after each."""
    stage = STAGES[name]
    values = stage.values(tokens, dtype)
    inputs = [values[x].requires_grad_() for x in stage.inputs]
    y = eager_of(name)(*inputs)
    done("d0")
    dy = torch.randn_like(y).requires_grad_()
    inner = torch.autograd.grad(y, inputs, dy, create_graph=True)
    done("d1")
    cotangents = [torch.randn_like(x) for x in inner]
    torch.autograd.grad(inner, [*inputs, dy], cotangents, allow_unused=True)
    done("d2")
