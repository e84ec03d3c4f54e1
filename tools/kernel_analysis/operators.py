"""The operators as data: what forward, backward and double backward take and what they return.

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

ORDERS = ("forward", "backward", "double_backward")
HEADS, WIDTH, MODEL, HIDDEN = 6, 64, 384, 1536
"""Sizes of a ViT-S; attention is counted for one head."""


@dataclass(frozen=True)
class Operator:
    """One operator on one sample of ``N`` tokens; attention on one head of it."""

    inputs: Mapping[str, tuple[int | str, ...]]  # differentiable arguments; "N" is the token count
    constants: Mapping[str, Any]  # the rest
    results: Mapping[str, tuple[str, ...]]  # order -> names of what it returns
    cotangents: Mapping[str, str]  # cotangent -> the result it belongs to
    most_tokens: int | None = None  # how many the interpreter can count in two minutes

    def values(self, tokens: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        """Return random inputs by name, and the constants."""
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

OPERATORS: dict[str, Operator] = {
    "attention": Operator(
        inputs=dict.fromkeys("qkv", (1, 1, "N", WIDTH)),
        constants={
            **{"mask": None, "seed": None, "ddmask": None},
            **{"is_causal": False, "scale": WIDTH**-0.5, "dropout_p": 0.0, "mask_grad": False},
        },
        results={
            "forward": ("o", "softmax"),
            "backward": ("dq", "dk", "dv", "dmask"),
            "double_backward": ("gq", "gk", "gv", "gdo", "gmask"),
        },
        cotangents={"do": "o", "ddq": "dq", "ddk": "dk", "ddv": "dv"},
    ),
    "layer_norm": Operator(
        inputs={"x": (1, "N", MODEL), "weight": (MODEL,), "bias": (MODEL,)},
        constants={"axes": 1, "eps": 1e-5, "weight_grad": True, "bias_grad": True},
        results={
            "forward": ("y", "mean", "rstd"),
            "backward": ("dx", "dw", "db"),
            "double_backward": ("gx", "gw", "gdy"),
        },
        cotangents={"dy": "y", "ddx": "dx", "ddw": "dw", "ddb": "db"},
    ),
    "gelu": Operator(
        inputs={"x": (1, "N", HIDDEN)},
        constants={"approximate": "none"},
        results={"forward": ("y",), "backward": ("dx",), "double_backward": ("gx", "gdy")},
        cotangents={"dy": "y", "ddx": "dx"},
    ),
    "head_penalty": Operator(
        inputs={"grads": (1, HEADS, "N", MODEL)},
        constants=_KIND,
        results={
            "forward": ("penalty", "cosines", "norms"),
            "backward": ("dgrads",),
            "double_backward": ("ggrads", "gdpenalty", "gdcosines"),
        },
        cotangents={"dpenalty": "penalty", "ddgrads": "dgrads"},
    ),
    "routed_head_penalty": Operator(
        inputs={"grad_qkv": (1, "N", 3, HEADS, WIDTH), "weight": (3, HEADS, WIDTH, MODEL)},
        constants=_KIND,
        results={
            "forward": ("penalty", "cosines", "norms"),
            "backward": ("dgrad_qkv", "dweight"),
            "double_backward": ("ggrad_qkv", "gweight", "gdpenalty", "gdcosines"),
        },
        cotangents={"dpenalty": "penalty", "ddgrad_qkv": "dgrad_qkv", "ddweight": "dweight"},
        most_tokens=17,
    ),
}


def folder(name: str) -> str:
    """Return the folder of an operator in a backend."""
    return "head_penalty" if name == "routed_head_penalty" else name


def missing(name: str) -> str | None:
    """Return why the operator has no Triton kernels to analyse; None if it has them."""
    module = f"diversevit_kernels.triton.{folder(name)}"
    if find_spec(module) is None:
        return f"{name}: no module {module}"
    try:
        functions = import_module(module)
    except ImportError as error:
        return f"{name}: {error}"
    absent = [order for order in ORDERS if not hasattr(functions, f"{name}_{order}")]
    return f"{name}: no {absent[0]} in {module}" if absent else None


def with_flat_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backend's function with the fields of the named tuple that it takes, if it takes one, as arguments."""
    inputs: Any = next(iter(inspect.signature(function).parameters.values())).annotation
    if not (isinstance(inputs, type) and issubclass(inputs, tuple)):
        return function

    def call(*args: Any, **options: Any) -> Any:
        return function(inputs(*args, **options))

    call.__signature__ = inspect.signature(inputs)  # pyright: ignore[reportFunctionMemberAccess]
    return call


def run_orders(
    name: str, values: dict[str, Any], around: Callable[[str, Callable[[], Any]], Any]
) -> None:
    """Run the Triton backend's three orders in turn on ``values``, which collects what they return.

    Args:
        around: called with the order and a function that runs it; returns what that returns.
    """
    operator, module = OPERATORS[name], import_module(f"diversevit_kernels.triton.{folder(name)}")
    for order in ORDERS:
        function = with_flat_arguments(getattr(module, f"{name}_{order}"))
        wanted = inspect.signature(function).parameters
        absent = [p for p in wanted if p not in values and wanted[p].default is inspect._empty]
        if absent:
            raise TypeError(
                f"{name}_{order}: tools/kernel_analysis/operators.py has no value for {absent[0]}"
            )
        arguments = {p: values[p] for p in wanted if p in values}
        returned = around(order, lambda f=function, given=arguments: f(**given))
        returned = returned if isinstance(returned, tuple) else (returned,)
        values |= dict(zip(operator.results[order], returned, strict=False))
        for cotangent, of in operator.cotangents.items():
            if cotangent not in values and values.get(of) is not None:
                values[cotangent] = torch.randn_like(values[of])


def run_orders_eagerly(
    name: str, tokens: int, dtype: torch.dtype, done: Callable[[str], None]
) -> None:
    """Run the same three orders by autograd through the eager formula; call ``done`` with each after it."""
    operator = OPERATORS[name]
    values = operator.values(tokens, dtype)
    inputs = [values[x].requires_grad_() for x in operator.inputs]
    y = eager_of(name)(*inputs)
    done("forward")
    dy = torch.randn_like(y).requires_grad_()
    inner = torch.autograd.grad(y, inputs, dy, create_graph=True)
    done("backward")
    cotangents = [torch.randn_like(x) for x in inner]
    torch.autograd.grad(inner, [*inputs, dy], cotangents, allow_unused=True)
    done("double_backward")
