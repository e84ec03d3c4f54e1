"""Seeing and changing the attention of a model somebody else wrote, without writing to it.

Inside an ``Attachment`` every chosen attention module is an instance of a subclass of its own class whose
forward says which layer is running and then runs the original forward, and a ``TorchFunctionMode``
sees the calls that forward makes. Parameters, ``state_dict`` and other modules are not touched; leaving
the block restores the classes. Nothing is kept on a module, so copies and pickles are plain.

Inside a compiled loss (``compile_loss``) the compiler does not see a changed class, so there a layer
runs from its qkv projection to its output projection, both known by their weights.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import nn as dnn
from .errors import UnsupportedError, expected
from .ops import attention
from .ops.attention import attention_operator


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of a model: ``qkv`` and ``proj`` are its projections."""

    index: int  # among the model's attention layers, in order of definition
    name: str  # as in ``model.named_modules()``
    module: Any  # ``qkv`` Linear [3 H d, D], ``proj`` Linear [D, H d], ``num_heads``, ``head_dim``

    @property
    def num_heads(self) -> int:
        return self.module.num_heads

    @property
    def weight_qkv(self) -> Tensor:
        """The qkv projection's weight as ``[3, H, d, D]``."""
        return self.module.qkv.weight.unflatten(0, (3, self.num_heads, -1))

    def split_qkv(self, x: Tensor) -> Tensor:
        """The qkv projection's output, or its gradient, ``[B, N, 3 H d]`` as ``[B, N, 3, H, d]``."""
        return x.unflatten(-1, (3, self.num_heads, -1))


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Every attention layer of ``model`` that this version can attach to, in order of definition.

    Raises:
        UsageError: ``model`` is not a module, or none was found.
    """
    if not isinstance(model, nn.Module):
        raise expected("model", "a torch.nn.Module", type(model).__name__, "pass the model itself")
    kinds = _attention_classes()
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    if not found:
        wanted = "a model with timm Attention or dvf.nn.MultiHeadAttention layers"
        raise expected("model", wanted, type(model).__name__, "build its attention of one of these")
    return [AttentionLayer(i, name, module) for i, (name, module) in enumerate(found)]


def choose_layers(model: nn.Module, layers: str | Sequence[int]) -> list[AttentionLayer]:
    """The layers that ``"last"``, ``"all"`` or a list of indices (negative allowed) names.

    Raises:
        UsageError: unknown word, empty list, repeated or out-of-range index.
    """
    every = attention_layers(model)
    if isinstance(layers, str):
        if layers not in ("last", "all"):
            wanted = "'last', 'all' or a list of indices"
            raise expected("layers", wanted, repr(layers), "check the spelling")
        return every if layers == "all" else every[-1:]
    if not isinstance(layers, Sequence) or not layers:
        raise expected("layers", "'last', 'all' or a list of indices", repr(layers), "name a layer")
    chosen = [layer_index(index, len(every)) for index in layers]
    if len(set(chosen)) < len(chosen):
        raise expected("layers", "each layer once", list(layers), "remove the repetition")
    return [every[index] for index in sorted(chosen)]


def blocks_from(model: nn.Module, first: AttentionLayer) -> list[nn.Module]:
    """The modules that hold the attention layers of ``model`` from ``first`` up, ``model`` if none does."""
    names = [layer.name.rpartition(".")[0] for layer in attention_layers(model)[first.index :]]
    return [model.get_submodule(name) for name in dict.fromkeys(names)]


def layer_index(index: int, count: int) -> int:
    """``index`` counted from the front.

    Raises:
        UsageError: not an integer, or outside ``-count .. count - 1``.
    """
    if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
        wanted = f"layer indices from {-count} to {count - 1}"
        raise expected("layers", wanted, repr(index), f"the model has {count} attention layers")
    return index % count


def _attention_classes() -> tuple[type, ...]:
    """Classes with ``qkv``, ``proj``, ``num_heads`` that call attention once; timm's if imported."""
    timm = sys.modules.get("timm.layers.attention") or sys.modules.get(
        "timm.models.vision_transformer"
    )
    return (dnn.MultiHeadAttention, *([timm.Attention] if timm is not None else []))


def _refuse_compiled(model: nn.Module, first: AttentionLayer) -> None:
    """A compiled forward that holds a chosen layer, or comes after one, cannot be attached to."""
    below = True
    for name, module in model.named_modules():
        holds = not name or first.name.startswith(f"{name}.") or name == first.name
        below = below and module is not first.module
        compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        if compiled and (holds or not below):
            raise UnsupportedError(
                f"model: {name or type(model).__name__} is compiled, so its second derivative would "
                "be refused or dropped; compile only the blocks below the chosen layers, or none"
            )


Forward = Callable[..., Any]
Wrapper = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]


class _Mode(TorchFunctionMode):
    """Shows every torch call to an attachment, which is no mode: a compiler would skip its entry."""

    def __init__(self, owner: "Attachment"):
        super().__init__()
        self.owner = owner

    def __torch_function__(
        self,
        func: Forward,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.owner._see(func, args, kwargs or {})


class Attachment:
    """A context in which chosen modules' forwards run inside wrappers and torch calls are seen.

    Subclasses say what happens: ``projected`` sees a layer's qkv projection output and returns what
    the model goes on with, ``attended`` runs a layer's attention, ``elsewhere`` sees other calls.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer]):
        _refuse_compiled(model, layers[0])
        self.model, self.layers = model, list(layers)
        self._wrappers: dict[nn.Module, Wrapper] = {
            layer.module: self._run_layer(layer) for layer in layers
        }
        self._classes: dict[tuple[nn.Module, type], type] = {}
        self._swapped: list[tuple[nn.Module, type, type]] = []
        self._running: AttentionLayer | None = None
        self._mode = _Mode(self)
        self._inside = False
        self._active = True  # the last block was not one that does nothing

    def active(self) -> bool:
        """Asked at each entry: whether this ``with`` block does anything."""
        return True

    def projected(self, layer: AttentionLayer, qkv: Tensor) -> Tensor:
        """Called with the qkv projection's output ``[B, N, 3 H d]``."""
        return qkv

    def attended(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        """Called in place of attention; ``attend(*qkv, **options)`` computes ``[B, H, N, d]``."""
        return attend(*qkv, **options)

    def elsewhere(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in place of every other torch function."""
        return func(*args, **kwargs)

    def wrap(self, module: nn.Module, wrapper: Wrapper) -> None:
        """Also run ``module``'s forward inside ``wrapper``, outside what wraps it already."""
        inner = self._wrappers.get(module)
        self._wrappers[module] = wrapper if inner is None else _around(wrapper, inner)

    def __enter__(self) -> "Attachment":
        if self._inside:
            raise expected("with", "a context that is not entered", "one that is", "enter it once")
        self._active = self.active()
        if self._active:
            _refuse_broken_graph()
            self._swap_classes()
            self._mode.__enter__()
        self._inside = True
        return self

    def __exit__(self, *exception: Any) -> None:
        self._inside = False
        if self._active:
            self._mode.__exit__(*exception)
        self._running = None
        while self._swapped:
            module, before, after = self._swapped.pop()
            if type(module) is after:
                module.__class__ = before

    def _see(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.linear and torch.compiler.is_compiling():
            self._follow(args[1])
        layer = self._running
        if layer is None:
            return self.elsewhere(func, args, kwargs)
        if func is F.linear and args[1] is layer.module.qkv.weight:
            return self.projected(layer, func(*args, **kwargs))
        if func in (F.scaled_dot_product_attention, attention):
            return self.attended(layer, func, *_split_attention_call(args, kwargs))
        if func is attention_operator._opoverload:  # a compiler sees the operator, not its function
            options: dict[str, Any] = {}
            options["attn_mask"], options["is_causal"], options["scale"] = args[3:]
            return (self.attended(layer, attention, args[:3], options),)
        return self.elsewhere(func, args, kwargs)

    def _swap_classes(self) -> None:
        if torch.compiler.is_compiling():
            return
        for module, wrapper in self._wrappers.items():
            before = type(module)
            key = (module, before)
            if key not in self._classes:
                self._classes[key] = _wrapped_class(before, wrapper)
            module.__class__ = self._classes[key]
            self._swapped.append((module, before, self._classes[key]))

    def _follow(self, weight: Tensor) -> None:
        """Under a compiler: which layer is running once ``weight`` was multiplied with."""
        for layer in self.layers:
            if weight is layer.module.qkv.weight:
                self._running = layer
            elif weight is layer.module.proj.weight:
                self._running = None

    def _run_layer(self, layer: AttentionLayer) -> Wrapper:
        def run(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            before, self._running = self._running, layer
            try:
                return forward(*args, **kwargs)
            finally:
                self._running = before

        return run


def _around(outer: Wrapper, inner: Wrapper) -> Wrapper:
    def wrapper(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return outer(module, lambda *a, **k: inner(module, forward, a, k), args, kwargs)

    return wrapper


def _refuse_broken_graph() -> None:
    """In a compiled function, entered eagerly after all, or without ``compile_loss``'s switch."""
    if torch.compiler.is_compiling():
        broken = not torch._dynamo.config.trace_autograd_ops
    else:
        broken = callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())  # pyright: ignore
    if broken:
        raise UnsupportedError(
            "torch.compile: it broke the graph around this context, so second derivatives would be "
            "refused or dropped; use dvf.compile_loss, which keeps one graph"
        )


def open_attachments() -> list[Attachment]:
    """The attachments whose ``with`` block is running, the outermost first."""
    modes = _get_current_function_mode_stack()
    return [mode.owner for mode in modes if isinstance(mode, _Mode)]


def _split_attention_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """(q, k, v) and the other arguments by name, of F.scaled_dot_product_attention or attention."""
    named = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False))
    named |= {_ATTENTION_ALIASES.get(name, name): value for name, value in kwargs.items()}
    return (named.pop("q"), named.pop("k"), named.pop("v")), named


_ATTENTION_ARGUMENTS = tuple(signature(attention).parameters)
_ATTENTION_ALIASES = {"query": "q", "key": "k", "value": "v"}


def _wrapped_class(base: type, wrapper: Wrapper) -> type:
    """A subclass of ``base`` under its own name whose forward goes through ``wrapper``."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = super(swapped, self).forward  # pyright: ignore (a class made here)
        return wrapper(self, plain, args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # noqa: N807
        reduced: Any = base.__reduce_ex__(self, max(2, protocol))  # pyright: ignore
        return (_bare_instance, (plain_class_of(base),), *reduced[2:])

    body = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "_plain_class": plain_class_of(base),
    }
    swapped = type(base.__name__, (base,), body)
    return swapped


def _bare_instance(cls: Any) -> Any:
    return cls.__new__(cls)


def plain_class(module: nn.Module) -> type:
    """The class that ``module`` has outside every ``Attachment``."""
    return plain_class_of(type(module))


def plain_class_of(cls: type) -> type:
    return cls.__dict__.get("_plain_class", cls)
