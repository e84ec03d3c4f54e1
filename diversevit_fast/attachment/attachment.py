"""Attachment: observes and changes the attention of any model while its ``with`` block is open.

Inside the block the class of every chosen attention module is a subclass of its own, whose forward notes
which layer is running and then runs the original forward. A ``TorchFunctionMode`` (``torch_calls``) sees the calls
that this forward makes. Parameters, ``state_dict`` and other modules are not touched, and leaving the block
restores the classes. Nothing is stored on a module, so the model's copies and pickles are ordinary ones.
An attachment may be copied or pickled outside its block; the copy observes the model that was copied with it.

Under ``compile_loss`` the compiler does not see the changed classes. There a layer is taken to run from its
first projection to its output projection, which are recognised by their weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch_internals import overload_of
from ..errors import UnsupportedError, usage_error
from ..ops import attention, attention_qkvpacked
from ..ops.attention import attention_operator
from .attention_maps import AttentionMaps
from .attention_modules import AttentionLayer
from .call_arguments import linear_call, split_attention_call
from .class_swap import Wrapper, around, refuse_own_forward, set_class, swapped_class
from .compiled_code import refuse_broken_graph, refuse_compiled_layers
from .packed_projection import PackedAttention, twice_differentiable
from .recomputation import Moment, copies_of, recompute_inside
from .seen_attention import computed_by
from .support import HOW_TO_FUSE
from .torch_calls import (
    Forward,
    Handler,
    TorchCalls,
    in_second_order,
    open_attachments,
    this_thread,
)
from .torch_mha import multi_head_attention
from .unfused_attention import Unfused, is_watched

_ATTENTION_OVERLOAD = overload_of(attention_operator)
"""What a compiler sees in place of ``dvf.attention``."""


class Attachment:
    """Context manager that calls its hooks while the chosen attention layers of a model run.

    Subclasses override the hooks ``on_enter``, ``on_layer_start``, ``on_projection``, ``on_attention`` and
    ``on_torch_function``. Forwards on other threads are left alone.

    Attributes:
        replaced: torch functions that ``on_torch_function`` is called for, in the first chosen layer that runs and
            ever after. Without any, no call outside chosen layers is seen.
        keeps_heads: whether ``on_attention`` keeps what it returns, so that the model has to go on with that tensor.
    """

    replaced: frozenset[Any] = frozenset()
    keeps_heads = True

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer]):
        refuse_compiled_layers(model, layers[0].module)
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
        self._mode = TorchCalls(self, dict.fromkeys(self.replaced, _replaced) | _ATTENTION_CALLS)
        self._from_entry = False  # whether calls are seen before a layer runs
        self._thread: int | None = None  # the one inside the block
        self._active = True  # what on_enter returned
        self._resumed: Moment | None = None  # of a copy that recomputes
        self._copies: list[Attachment] = []  # that do

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
        return self._options()

    def _options(self) -> dict[str, Any]:
        """The attributes that ``_reset`` does not set."""
        blank = object.__new__(type(self))
        blank._reset()
        return {name: value for name, value in vars(self).items() if name not in vars(blank)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        self.__dict__.update(state)

    def recomputation(self) -> Callable[[], Any]:
        """What a checkpoint that begins now recomputes in: a copy of this block, as the block is now."""
        kind, options, moment = type(self), self._options(), self._moment()

        def make() -> Attachment:
            made = object.__new__(kind)
            made.__setstate__(options)
            return made

        entered = copies_of(make, self._copies)
        return lambda: entered(moment)

    def _moment(self) -> Moment:
        return Moment(self._mode.started, self._running, self._attention_called)

    def resume(self, moment: Moment) -> None:
        """Begin the next block as that of which ``moment`` is."""
        self._resumed = moment

    def forget(self) -> None:
        """Forget what a block that recomputed kept, which leads to its graph."""
        self._resumed = None

    def on_enter(self) -> bool:
        """Called at each entry; returns whether this ``with`` block does anything."""
        return True

    def on_layer_start(self, layer: AttentionLayer) -> None:
        """Called when a layer's forward begins."""

    def on_projection(
        self, layer: AttentionLayer, roles: str, x: Tensor, weight: Tensor, out: Tensor
    ) -> Tensor:
        """Called with a projection's input, weight and output ``[B, N, len(roles) H d]`` or ``[B, N, 3, H, d]``.

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
        return not torch.compiler.is_compiling() and in_second_order()

    def running_layer(self) -> AttentionLayer | None:
        """The chosen layer that is running."""
        return self._running

    def on_linear(self, x: Tensor, out: Tensor) -> None:
        """Called after a linear layer of ``x`` that is no projection of a chosen layer."""

    def on_torch_function(
        self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Called in place of a function of ``replaced``, and of attention outside chosen layers."""
        return func(*args, **kwargs)

    def wrap(self, module: nn.Module, wrapper: Wrapper) -> None:
        """Run ``module``'s forward inside ``wrapper``, around the wrappers it already has."""
        inner = self._wrappers.get(module)
        self._wrappers[module] = wrapper if inner is None else around(wrapper, inner)

    def sees_alone(self, module: nn.Module) -> bool:
        """Whether no other attachment that is open on this thread has a wrapper around ``module``."""
        others = (x for x in open_attachments() if x is not self and isinstance(x, Attachment))
        return not any(module in other._wrappers for other in others)

    def __enter__(self) -> "Attachment":
        if self._thread is not None:
            raise usage_error(
                "with", "a context that is not entered", "one that is", "enter it once"
            )
        self._active = self._resumed is not None or self.on_enter()
        if self._active:
            refuse_broken_graph()
            self._swap_classes()
            self._see_calls()
        self._thread = this_thread()
        if self._resumed is not None:
            self._running, self._attention_called = self._resumed[1:3]
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
                set_class(module, before)

    def _see_calls(self) -> None:
        if torch.compiler.is_compiling():  # the classes are not swapped: layers are found by calls
            self._mode.__enter__()
            return
        self._mode.open()
        if self._from_entry or (self._resumed is not None and self._resumed.started):
            self._mode.start()

    @property
    def calls(self) -> TorchCalls:
        """Sees calls while it is started; ``run_by_hand`` stops it."""
        return self._mode

    def run_by_hand(self, layer: AttentionLayer, x: Tensor, rest: Callable[[Tensor], Any]) -> Any:
        """Return ``rest(qkv)`` for a layer that has one linear layer for q, k and v; from then on see no calls.

        ``qkv`` is its projection of ``x``, ``[B, N, 3, H, d]``.
        """
        self._mode.stop()
        before = self._running, self._attention_called
        self._begin(layer)
        try:
            linear: Any = layer.projections[0].owner
            qkv = linear(x).view(*x.shape[:2], 3, layer.num_heads, -1)
            return rest(self.on_projection(layer, "qkv", x, linear.weight, qkv))
        finally:
            self._running, self._attention_called = before

    def attend_by_hand(self, layer: AttentionLayer, qkv: Tensor, queries: int) -> Tensor:
        """The heads of the first tokens, ``[B, queries, H, d]``, inside ``run_by_hand``."""
        attend = PackedAttention(qkv, queries=queries)
        return self._continued(attend, self.on_attention(layer, attend, attend.parts, {}))

    def _on_linear(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight = linear_call(args, kwargs) if kwargs else args[:2]
        if torch.compiler.is_compiling():
            self._follow_weight(weight)
        layer = self._running
        made = None if layer is None else layer.projection_of(weight)
        out = func(*args, **kwargs)
        if layer is None or made is None:
            self.on_linear(x, out)
            return out
        return self._project(layer, made.roles, x, weight, out)

    def _on_attention(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._running
        if layer is None:
            return self.on_torch_function(func, args, kwargs)
        return self._attend(layer, func, *split_attention_call(args, kwargs))

    def _on_packed(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._running
        if layer is None:
            return func(*args, **kwargs)
        options = dict(kwargs)
        packed = PackedAttention(*args, queries=options.pop("queries", None))
        return self._continued(packed, self._attend(layer, packed, packed.parts, options))

    def _continued(self, attend: PackedAttention, heads: Tensor) -> Tensor:
        """``[B, N, H, d]`` that the model goes on with, of what ``on_attention`` returned."""
        same = heads is attend.heads and not self.keeps_heads
        return attend.made if same else heads.transpose(1, 2)

    def _on_computed(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle attention that another attachment computes in a way of its own."""
        layer, (how, *qkv) = self._running, args
        if layer is not None:
            return self._attend(layer, how, tuple(qkv), kwargs)
        if isinstance(how, AttentionMaps) and how.attend is F.scaled_dot_product_attention:
            how.attend = attention if self._second_order() else how.attend
        return func(*args, **kwargs)

    def _on_overload(self, func: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handle a call of what a compiler sees in place of ``dvf.attention``."""
        layer = self._running
        if layer is None:
            return func(*args, **kwargs)
        names = ("attn_mask", "is_causal", "scale", "dropout_p")
        options = dict(zip(names, (args[3], *args[5:]), strict=True))
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
        recompute_inside()
        out = self.on_projection(layer, roles, x, weight, out)
        if roles == "qkv" and not torch.compiler.is_compiling():
            self._made = out
        return out

    def _attend(self, layer: AttentionLayer, attend: Forward, qkv: Any, options: Any) -> Tensor:
        q = qkv[0]
        recompute_inside()
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
        if isinstance(attend, AttentionMaps):
            attend.attend = self._chosen(layer, attend.attend, qkv, options)
        else:
            attend = self._chosen(layer, attend, qkv, options)
        self._made = None
        return self.on_attention(layer, attend, qkv, options)

    def _chosen(self, layer: AttentionLayer, attend: Forward, qkv: Any, options: Any) -> Forward:
        """What computes attention that the model asks ``attend`` for."""
        if isinstance(attend, Unfused):
            return attend
        compiling = torch.compiler.is_compiling()
        if not compiling and is_watched(layer.module, options.get("dropout_p", 0.0)):
            return Unfused.of(layer.module)
        stock = attend is F.scaled_dot_product_attention
        if attend is attention or (stock and self._second_order()):
            return twice_differentiable(layer, self._made, *qkv)
        return attend

    def _swap_classes(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._wrappers:
            self._wrap_all()
        for layer in self.layers:
            refuse_own_forward(layer.name, layer.module)
        attentions = {layer.module for layer in self.layers}
        for module, wrapper in self._wrappers.items():
            before = type(module)
            key = (module, before)
            if key not in self._classes:
                attends = {"fused_attn": True} if module in attentions else {}
                self._classes[key] = swapped_class(before, self._where_open(wrapper), attends)
            set_class(module, self._classes[key])
            self._swapped.append((module, before, self._classes[key]))

    def _where_open(self, wrapper: Wrapper) -> Wrapper:
        """``wrapper`` where this block sees forwards: on its thread, and not where a checkpoint recomputes."""

        def call(module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
            if self._thread == this_thread() and not self._mode.paused:
                return wrapper(module, forward, args, kwargs)
            if self._thread is not None and torch.compiler.is_compiling():
                self._mode.start()  # of an exporter: it finds layers by the calls that they make
            return forward(*args, **kwargs)

        return call

    def _begin(self, layer: AttentionLayer) -> None:
        recompute_inside()
        self._running, self._attention_called, self._made = layer, False, None
        self.on_layer_start(layer)

    def _finish(self, layer: AttentionLayer) -> None:
        if not self._attention_called:
            raise UnsupportedError(
                f"model: {layer.name} ({type(layer.module).__name__}) computed attention without "
                f"F.scaled_dot_product_attention, so its heads cannot be seen; {HOW_TO_FUSE}"
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


def _replaced(attachment: Attachment, func: Forward, args: tuple, kwargs: dict) -> Any:
    recompute_inside()
    return attachment.on_torch_function(func, args, kwargs)


_ATTENTION_CALLS: dict[Any, Handler] = {
    F.linear: Attachment._on_linear,
    F.multi_head_attention_forward: Attachment._on_multi_head_attention,
    F.scaled_dot_product_attention: Attachment._on_attention,
    attention: Attachment._on_attention,
    attention_qkvpacked: Attachment._on_packed,
    computed_by: Attachment._on_computed,
    _ATTENTION_OVERLOAD: Attachment._on_overload,
}
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
