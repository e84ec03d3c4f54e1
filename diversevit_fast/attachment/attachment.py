"""Attachment: observes and changes the attention of any model while its ``with`` block is open.

Inside the block the class of every chosen attention module is a subclass of its own, whose forward notes
which layer is running and then runs the original forward. A ``TorchFunctionMode`` (``torch_calls``) sees the calls
that this forward makes. Parameters, ``state_dict`` and other modules are not touched, and leaving the block
restores the classes. Nothing is stored on a module, so the model's copies and pickles are ordinary ones.
An attachment may be copied or pickled outside its block; the copy observes the model that was copied with it.

Under ``compile_loss`` the compiler does not see the changed classes. There a layer is taken to run from its
first projection to its output projection, which are recognised by their weights.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch_internals import (
    compiler_traces_gradients,
    frame_callback,
    is_compiled,
    overload_of,
)
from ..errors import UnsupportedError, usage_error
from ..ops import attention, attention_qkvpacked
from ..ops.attention import attention_operator
from .attention_modules import AttentionLayer, plain_class_of
from .packed_projection import PackedAttention, may_pack, packed_attention
from .torch_calls import Forward, Handler, TorchCalls
from .torch_mha import multi_head_attention
from .unfused_attention import Unfused, is_watched

_ATTENTION_OVERLOAD = overload_of(attention_operator)
"""What a compiler sees in place of ``dvf.attention``."""


def _refuse_compiled(model: nn.Module, first: AttentionLayer) -> None:
    """Refuse a model with a compiled module that contains a chosen layer or follows one."""
    below = True
    for name, module in model.named_modules():
        holds = not name or first.name.startswith(f"{name}.") or name == first.name
        below = below and module is not first.module
        if is_compiled(module) and (holds or not below):
            raise UnsupportedError(
                f"model: {name or type(model).__name__} is compiled, so its second derivative would "
                "be refused or dropped; compile only the blocks below the chosen layers, or none"
            )


Wrapper = Callable[[nn.Module, Forward, tuple[Any, ...], dict[str, Any]], Any]


class Attachment:
    """Context manager that calls its hooks while the chosen attention layers of a model run.

    Subclasses override the hooks ``on_enter``, ``on_layer_start``, ``on_projection``, ``on_attention`` and
    ``on_torch_function``. Forwards on other threads are left alone.

    Attributes:
        replaced: torch functions that ``on_torch_function`` is called for, in the first chosen layer that runs and
            ever after. Without any, no call outside chosen layers is seen.
    """

    replaced: frozenset[Any] = frozenset()

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer]):
        _refuse_compiled(model, layers[0])
        self.model, self.layers = model, list(layers)
        self._reset()
        self._wrap_all()

    def _reset(self) -> None:
        """Set the attributes that copies and pickles do not take over from the original."""
        self._wrappers: dict[nn.Module, Wrapper] = {}
        self._classes: dict[tuple[nn.Module, type], type] = {}
        self._swapped: list[tuple[nn.Module, type, type]] = []
        self._running: AttentionLayer | None = None
        self._attention_called = False
        self._made: Tensor | None = None  # by the running layer's one projection, until it attends
        handlers = {**dict.fromkeys(self.replaced, _replaced), **_ATTENTION_CALLS}
        self._mode = TorchCalls(self, handlers)
        self._from_entry = False  # whether calls are seen before a layer runs
        self._thread: int | None = None  # the one inside the block
        self._active = True  # what on_enter returned

    def _wrap_all(self) -> None:
        """Make the wrappers. A copy does it at its first entry, when its model is complete."""
        self._wrappers = {layer.module: self._run_layer(layer) for layer in self.layers}
        # its fast path passes by its attention module, but for who sees torch calls
        self._from_entry = any(isinstance(m, _FAST_PATHS) for m in self.model.modules())

    def __getstate__(self) -> dict[str, Any]:
        """The attributes that copies and pickles take over.

        Raises:
            UsageError: the ``with`` block is open.
        """
        if self._thread is not None:
            name, wanted = type(self).__name__, "to be copied or pickled outside its `with` block"
            raise usage_error(name, wanted, "an open block", "leave it first")
        blank = object.__new__(type(self))
        blank._reset()
        return {name: value for name, value in vars(self).items() if name not in vars(blank)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def on_enter(self) -> bool:
        """Called at each entry; returns whether this ``with`` block does anything."""
        return True

    def on_layer_start(self, layer: AttentionLayer) -> None:
        """Called when a layer's forward begins."""

    def on_projection(
        self, layer: AttentionLayer, roles: str, x: Tensor, weight: Tensor, out: Tensor
    ) -> Tensor:
        """Called with a projection's input, weight and output ``[B, N, len(roles) H d]``.

        The model continues with the tensor returned.
        """
        return out

    def on_attention(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        """Called in place of attention; ``attend(*qkv, **options)`` computes ``[B, H, N, d]``."""
        return attend(*qkv, **options)

    def _second_order(self) -> bool:
        """Whether attention that runs now is to be twice differentiable; else it is what the model calls."""
        return False

    def on_torch_function(
        self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Called in place of a function of ``replaced``, and of attention outside chosen layers."""
        return func(*args, **kwargs)

    def wrap(self, module: nn.Module, wrapper: Wrapper) -> None:
        """Run ``module``'s forward inside ``wrapper``, around the wrappers it already has."""
        inner = self._wrappers.get(module)
        self._wrappers[module] = wrapper if inner is None else _around(wrapper, inner)

    def __enter__(self) -> "Attachment":
        if self._thread is not None:
            raise usage_error(
                "with", "a context that is not entered", "one that is", "enter it once"
            )
        self._active = self.on_enter()
        if self._active:
            _refuse_broken_graph()
            self._swap_classes()
            self._see_calls()
        self._thread = _this_thread()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._thread = None
        if self._active and torch.compiler.is_compiling():
            self._mode.__exit__(*exception)
        elif self._active:
            self._mode.close()
        self._running = self._made = None
        while self._swapped:
            module, before, after = self._swapped.pop()
            if type(module) is after:
                _set_class(module, before)

    def _see_calls(self) -> None:
        if torch.compiler.is_compiling():  # the classes are not swapped: layers are found by calls
            self._mode.__enter__()
            return
        self._mode.open()
        if self._from_entry:
            self._mode.start()

    def _on_linear(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = _linear_call(args, kwargs) if kwargs else args[:2]
        if torch.compiler.is_compiling():
            self._follow_weight(weight)
        layer = self._running
        made = None if layer is None else layer.projection_of(weight)
        if layer is None or made is None:
            return func(*args, **kwargs)
        return self._project(layer, made.roles, x, weight, func(*args, **kwargs))

    def _on_attention(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._running
        if layer is None:
            return self.on_torch_function(func, args, kwargs)
        return self._attend(layer, func, *_split_attention_call(args, kwargs))

    def _on_packed(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._running
        if layer is None:
            return func(*args, **kwargs)
        packed = PackedAttention(*args)
        return self._attend(layer, packed, packed.parts, kwargs).transpose(1, 2)

    def _on_overload(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle a call of what a compiler sees in place of ``dvf.attention``."""
        layer = self._running
        if layer is None:
            return func(*args, **kwargs)
        options: dict[str, Any] = {}
        options["attn_mask"], options["is_causal"], options["scale"] = args[3:]
        return (self._attend(layer, attention, args[:3], options),)

    def _on_multi_head_attention(
        self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Handle a call of PyTorch's function for a whole multi-head attention."""
        layer = self._running
        if layer is None and torch.compiler.is_compiling():
            layer = self._layer_called_with(args)
        if layer is None or not layer.is_torch:
            return self.on_torch_function(func, args, kwargs)

        def project(roles: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self._project(layer, roles, x, weight, F.linear(x, weight, bias))

        def attend(by: Any, *qkv: Tensor, **options: Any) -> Tensor:
            return self._attend(layer, by or F.scaled_dot_product_attention, qkv, options)

        return multi_head_attention(args, kwargs, project, attend)

    def _project(
        self, layer: AttentionLayer, roles: str, x: Tensor, weight: Tensor, out: Tensor
    ) -> Tensor:
        out = self.on_projection(layer, roles, x, weight, out)
        if roles == "qkv" and not torch.compiler.is_compiling():
            self._made = out
        return out

    def _attend(self, layer: AttentionLayer, attend: Forward, qkv: Any, options: Any) -> Tensor:
        q, k, v = qkv
        if self._attention_called:
            raise UnsupportedError(
                f"model: {layer.name} calls attention more than once, so what a head is is not clear"
            )
        if q.ndim != 4 or q.shape[1] != layer.num_heads:
            raise UnsupportedError(
                f"model: {layer.name} has {layer.num_heads} heads but calls attention with "
                f"{list(q.shape)}, which is not [B, H, N, d]"
            )
        self._attention_called = True
        compiling = torch.compiler.is_compiling()
        if not compiling and is_watched(layer.module, options.get("dropout_p", 0.0)):
            attend = Unfused.of(layer.module)
        elif attend is attention or (
            attend is F.scaled_dot_product_attention and self._second_order()
        ):
            attend = self._twice_differentiable(layer, q, k, v)
        self._made = None
        return self.on_attention(layer, attend, qkv, options)

    def _twice_differentiable(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor
    ) -> Forward:
        """Attention of q, k and v: of the projection's whole output where they are its parts."""
        if self._made is None or not may_pack(layer.module, layer.linear):
            return attention
        return packed_attention(self._made, q, k, v) or attention

    def _swap_classes(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._wrappers:
            self._wrap_all()
        for layer in self.layers:
            if "forward" in vars(layer.module):
                raise UnsupportedError(
                    f"model: {layer.name} has a forward put on the instance, which would pass by this "
                    "context; remove it (accelerate: remove_hook_from_module)"
                )
        attentions = {layer.module for layer in self.layers}
        for module, wrapper in self._wrappers.items():
            before = type(module)
            key = (module, before)
            if key not in self._classes:
                self._classes[key] = self._wrapped_class(before, wrapper, module in attentions)
            _set_class(module, self._classes[key])
            self._swapped.append((module, before, self._classes[key]))

    def _wrapped_class(self, base: type, wrapper: Wrapper, attends: bool) -> type:
        """Make a subclass of ``base``, of the same name, whose forward goes through ``wrapper``.

        On threads other than the one that entered, its forward is ``base``'s. timm's attention modules
        call fused attention only if ``self.fused_attn``, so here it is True; where the steps of unfused
        attention are watched, ``Unfused`` runs them.
        """

        @functools.partial(functools.update_wrapper, wrapped=base.forward, assigned=(), updated=())
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            plain = super(swapped, module).forward  # pyright: ignore (a class made here)
            if self._thread != _this_thread():
                if self._thread is not None and torch.compiler.is_compiling():
                    self._mode.start()  # of an exporter: it finds layers by the calls that they make
                return plain(*args, **kwargs)
            return wrapper(module, plain, args, kwargs)

        def __reduce_ex__(module: nn.Module, protocol: Any) -> Any:  # noqa: N807
            reduced: Any = base.__reduce_ex__(module, max(2, protocol))  # pyright: ignore
            return (_bare_instance, (plain_class_of(base),), *reduced[2:])

        body = {
            "forward": forward,
            "__reduce_ex__": __reduce_ex__,
            "__module__": base.__module__,
            "_plain_class": plain_class_of(base),
        }
        if attends:
            body["fused_attn"] = property(lambda _: True)  # overrides the instance's
        swapped = type(base.__name__, (base,), body)
        return swapped

    def _begin(self, layer: AttentionLayer) -> None:
        self._running, self._attention_called, self._made = layer, False, None
        self.on_layer_start(layer)

    def _finish(self, layer: AttentionLayer) -> None:
        if not self._attention_called:
            raise UnsupportedError(
                f"model: {layer.name} ({type(layer.module).__name__}) computed attention without "
                f"F.scaled_dot_product_attention, so its heads cannot be seen; {_HOW_TO_FUSE}"
            )

    def _follow_weight(self, weight: Tensor) -> None:
        """Under a compiler: note which layer begins or ends where ``weight`` is used."""
        for layer in self.layers:
            if self._running is not layer and layer.projection_of(weight) is not None:
                self._begin(layer)
            elif self._running is layer and layer.output and weight is layer.output.weight:
                self._finish(layer)
                self._running = None

    def _layer_called_with(self, args: tuple[Any, ...]) -> AttentionLayer | None:
        """Under a compiler: start the layer whose weights PyTorch's multi-head attention is called with."""
        for layer in self.layers:
            weight = layer.projections[0].weight
            if layer.is_torch and any(x is weight for x in args):
                self._attention_called = False
                self.on_layer_start(layer)
                return layer
        return None

    def _run_layer(self, layer: AttentionLayer) -> Wrapper:
        def run(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            before = self._running, self._attention_called
            started = self._mode.start()
            self._begin(layer)
            try:
                result = forward(*args, **kwargs)
                self._finish(layer)
            finally:
                self._running, self._attention_called = before
                if started and not self.replaced:
                    self._mode.stop()
            return result

        return run


_HOW_TO_FUSE = (
    "for transformers set attn_implementation='sdpa', inside a compiled loss timm's fused_attn=True, "
    "or choose other layers"
)


def _this_thread() -> int:
    """The current thread's number; 0 under a compiler, which cannot trace it."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _around(outer: Wrapper, inner: Wrapper) -> Wrapper:
    def wrapper(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        return outer(module, lambda *a, **k: inner(module, forward, a, k), args, kwargs)

    return wrapper


def _refuse_broken_graph() -> None:
    """Refuse to be entered by a compiled function outside its graph, or in a graph not of ``compile_loss``."""
    compiling = torch.compiler.is_compiling()
    if not compiler_traces_gradients() if compiling else callable(frame_callback()):
        raise UnsupportedError(
            "torch.compile: it broke the graph around this context, so second derivatives would be "
            "refused or dropped; use dvf.compile_loss, which keeps one graph"
        )


def _replaced(attachment: Attachment, func: Forward, args: tuple, kwargs: dict) -> Any:
    return attachment.on_torch_function(func, args, kwargs)


_ATTENTION_CALLS: dict[Any, Handler] = {
    F.linear: Attachment._on_linear,
    F.multi_head_attention_forward: Attachment._on_multi_head_attention,
    F.scaled_dot_product_attention: Attachment._on_attention,
    attention: Attachment._on_attention,
    attention_qkvpacked: Attachment._on_packed,
    _ATTENTION_OVERLOAD: Attachment._on_overload,
}
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The first axis of the first tensor in a model's call; 0 if there is none."""
    return next((len(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), 0)


def _linear_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The input and weight of a call of ``F.linear``."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    return named["input"], named["weight"]


def _split_attention_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """The (q, k, v) and the other arguments by name of a call of attention, PyTorch's or ours."""
    named = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False))
    named |= {_ATTENTION_ALIASES.get(name, name): value for name, value in kwargs.items()}
    return (named.pop("q"), named.pop("k"), named.pop("v")), named


_ATTENTION_ARGUMENTS = tuple(signature(attention).parameters)
_ATTENTION_ALIASES = {"query": "q", "key": "k", "value": "v"}


def _set_class(module: nn.Module, cls: type) -> None:
    """``module.__class__ = cls``, past what modules do when an attribute is set."""
    object.__setattr__(module, "__class__", cls)


def _bare_instance(cls: Any) -> Any:
    return cls.__new__(cls)
