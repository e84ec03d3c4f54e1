"""PrefixCache: runs a model for many choices of heads, and what precedes the heads only once.

The first forward of a batch is recorded up to the first attention in which the choices differ: the output
of every module that does not contain it, and its head outputs. In later forwards these modules return
the recorded outputs without running, the attention returns the recorded head outputs times the new
factors, and everything after it runs. Nothing is assumed about the model's structure: calls are matched
in order, and a module whose output cannot be cached (see ``PrefixCache``) runs again.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_internals import is_compiled, tree_flatten, tree_unflatten, write_count
from ..attachment.attachment import Attachment, Forward
from ..attachment.attention_modules import AttentionLayer, is_hooked
from ..attachment.support import refuse
from ..attachment.unfused_attention import Unfused
from ..errors import UnsupportedError, usage_error
from .pruning import Kept, head_scale

_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class _Recorded:
    """The arguments or the output of a call, with the version of each tensor (its count of writes)."""

    leaves: list[Any]
    structure: Any
    versions: list[int]

    @staticmethod
    def of(value: Any) -> "_Recorded | None":
        """Record ``value``; None if it holds anything but tensors and constants, which could change unseen."""
        leaves, structure = tree_flatten(value)
        if not all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in leaves):
            return None
        return _Recorded(leaves, structure, _versions(leaves))

    def intact(self) -> bool:
        return self.versions == _versions(self.leaves)

    def same(self, value: Any) -> bool:
        """True if ``value`` still holds the recorded tensors with their recorded contents."""
        leaves, structure = tree_flatten(value)
        unmoved = all(a is b for a, b in zip(leaves, self.leaves, strict=False))
        return structure == self.structure and unmoved and self.intact()

    def value(self) -> Any:
        return tree_unflatten(self.leaves, self.structure)


def _versions(leaves: Iterable[Any]) -> list[int]:
    """The version of each tensor; 0 for inference tensors, which cannot be written to outside inference mode."""
    tensors = (x for x in leaves if isinstance(x, Tensor))
    return [0 if x.is_inference() else write_count(x) for x in tensors]


@dataclass(frozen=True)
class _Call:
    """One module call before the attention, with its output unless it has to run again."""

    module: nn.Module
    output: _Recorded | None = None


class PrefixCache(Attachment):
    """Context manager that computes a model's outputs for many choices of heads.

    >>> with PrefixCache(model, layers) as cache:
    ...     for output in cache.outputs([{11: [0]}, {11: [1]}], images):
    ...         ...                             # as inside keep_heads(model, {11: [0]}), and so on

    A module's output is not cached, and the module or its children run again, where caching could change
    a result: the module is compiled, writes to its input, takes or returns something other than tensors
    and constants; its output is written to in place; a module inside it has hooks, which should see
    every forward (hooks for all modules, as profilers', see what runs). A module that passes something
    on in another way than its return value (a global, an attribute) does so once per batch.

    Args:
        model: runs in the mode (eval, train) it is in.
        layers: attention layers of ``model`` that choices may name.

    Raises:
        UnsupportedError: as ``keep_heads``.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer]):
        super().__init__(model, layers)
        refuse(self.layers, "mask")
        self._scale: dict[int, Tensor] = {}
        self._forget()

    def _wrap_all(self) -> None:
        super()._wrap_all()
        self._inside = {m: set(m.modules()) - {m} for m in self.model.modules()}
        chosen = {layer.module for layer in self.layers}
        compiled = {m for m in self._inside if _compiled(m)}
        left_alone = compiled.union(*(self._inside[m] for m in compiled))
        for module in self._inside:
            if module in chosen or module not in left_alone:
                self.wrap(module, self._run)
        self._uncacheable = {m for m, inside in self._inside.items() if is_hooked(inside)}

    def outputs(self, choices: Sequence[Kept], *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yield ``model(*args, **kwargs)`` for each choice, as inside ``keep_heads(model, choice)``.

        The first choice takes a whole forward; each further one computes what follows the first layer in
        which ``choices`` differ. The cache is emptied once the iterator is exhausted.

        Raises:
            UsageError: outside the ``with`` block.
            UnsupportedError: the model calls its modules in another order the second time.
        """
        if self._thread is None:
            raise usage_error(
                "with", "a PrefixCache that is entered", "one that is not", "use `with`"
            )
        self._varied = {
            layer.index
            for layer in self.layers
            if len({_heads(choice, layer) for choice in choices}) > 1
        }
        varied = {layer.module for layer in self.layers if layer.index in self._varied}
        around = {m for m, inside in self._inside.items() if not varied.isdisjoint(inside)}
        self._holds_heads = varied | around
        self._forget()
        try:
            for choice in choices:
                yield self._forward(choice, args, kwargs)
        finally:
            self._forget()

    def on_attention(
        self,
        layer: AttentionLayer,
        attend: Forward,
        qkv: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        if self._past_heads or layer.index not in self._varied:
            heads = attend(*qkv, **options)
        elif self._recording:
            heads = self._heads = attend(*qkv, **options)
            self._past_heads = True
        else:
            heads = self._heads
            if isinstance(attend, Unfused):  # its weights are watched, so they are computed again
                heads = attend(*qkv, **options)
            if heads is None or self._next < len(self._calls):
                raise _another_order(layer.name)
            self._past_heads = True
        scale = self._scale.get(layer.index)
        return heads if scale is None else heads * scale.to(heads)[:, None, None]

    def _forward(self, choice: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._scale = {
            layer.index: head_scale(layer, _heads(choice, layer), rescale=True)
            for layer in self.layers
            if layer.index in choice or layer.index in self._varied
        }
        written = {call.module for call in self._calls if call.output and not call.output.intact()}
        self._uncacheable |= written
        if written or self._discard:
            self._forget()
        self._recording, self._next = not self._calls, 0
        self._past_heads = False  # the first attention that choices differ in has run
        # inference tensors do not count writes; leaving inference mode turns gradients on
        with torch.inference_mode(False), torch.no_grad():
            return self.model(*args, **kwargs)

    def _run(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        if self._past_heads or self._caching is not None:
            return forward(*args, **kwargs)
        if self._recording:
            return self._record(module, forward, args, kwargs)
        call = self._calls[self._next] if self._next < len(self._calls) else None
        if call is None or call.module is not module:
            raise _another_order(type(module).__name__)
        self._next += 1
        return forward(*args, **kwargs) if call.output is None else call.output.value()

    def _record(self, module: nn.Module, forward: Forward, args: tuple, kwargs: dict) -> Any:
        given = _Recorded.of((args, kwargs))
        if given is None or module in self._holds_heads or module in self._uncacheable:
            self._calls.append(_Call(module))
            return forward(*args, **kwargs)
        self._caching = module
        try:
            output = forward(*args, **kwargs)
        finally:
            self._caching = None
        kept = _Recorded.of(output)
        if kept is None or self._past_heads or not given.same((args, kwargs)):
            self._uncacheable.add(module)  # too late to record the modules inside it
            self._discard = True
        else:
            self._calls.append(_Call(module, kept))
        return output

    def _forget(self) -> None:
        self._calls: list[_Call] = []
        self._heads: Tensor | None = None  # of the first attention that choices differ in
        self._caching: nn.Module | None = None  # running, and its output will be cached
        self._discard = False  # a module was found uncacheable: record anew


def _heads(choice: Kept, layer: AttentionLayer) -> tuple[int, ...]:
    return tuple(choice.get(layer.index, range(layer.num_heads)))


def _compiled(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) or is_compiled(module)


def _another_order(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"model: {name} runs in another place the second time with the same images, so what comes before "
        "the heads cannot be kept; evaluate with dvf.keep_heads instead"
    )
