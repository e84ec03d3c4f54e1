"""Find the attention modules of a model, with their projections and head counts.

A module is recognised by its attributes, not its class: a head count and linear layers for queries,
keys and values, under the names that timm, transformers, torch and open_clip use. That it calls
attention once, with these heads, is checked when it runs (``Attachment``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._torch_internals import has_hooks
from ..errors import usage_error
from .indices import Integers, as_list, describe, whole_number


@dataclass(frozen=True)
class Projection:
    """A linear layer's weight that makes some of a module's queries, keys and values."""

    owner: nn.Module
    attribute: str  # the weight's name in ``owner``
    roles: str  # "qkv", "kv", "q" ...: made by its last rows, in this order, H d rows each

    @property
    def weight(self) -> Tensor:
        return getattr(self.owner, self.attribute)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of a model."""

    index: int  # among the model's attention layers, in order of definition
    name: str  # as in ``model.named_modules()``
    module: Any
    projections: tuple[Projection, ...]
    output: nn.Linear | None  # the output projection [D, H d], where it is known
    query_reads: str = "all"  # its queries read "all" tokens, the "first", or "another" tensor

    @property
    def num_heads(self) -> int:
        return head_count(self.module)

    @property
    def linear(self) -> list[nn.Module]:
        """The modules that hold the weights of its projections; the output projection is last."""
        owners = list(dict.fromkeys(projection.owner for projection in self.projections))
        return owners if self.output is None else [*owners, self.output]

    def rows_of(self, roles: str) -> int:
        """The number of rows of the projection that makes ``roles``, H d for each.

        Where the projection makes something else as well (a parallel block's MLP), these are its last rows.
        """
        made = next(p for p in self.projections if p.roles == roles or roles in p.roles)
        split = getattr(self.module, "in_split", None)
        of_all = 3 * split[-1] if split else len(made.weight)
        return of_all * len(roles) // len(made.roles)

    @property
    def is_torch(self) -> bool:
        """True for ``nn.MultiheadAttention``, which calls one function for projections and attention."""
        return isinstance(self.module, nn.MultiheadAttention)

    def projection_of(self, weight: Any) -> Projection | None:
        """The projection that ``weight`` belongs to, or None."""
        for projection in self.projections:
            if projection.weight is weight:
                return projection
        return None


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """List every attention module of ``model``, in order of definition.

    Raises:
        UsageError: ``model`` is not a module, or none was found.
    """
    if not isinstance(model, nn.Module):
        raise usage_error(
            "model", "a torch.nn.Module", type(model).__name__, "pass the model itself"
        )
    found = [(n, m, p) for n, m in model.named_modules() if (p := _projections(m))]
    if not found:
        wanted = "a model with attention layers (num_heads, and linear layers for q, k and v)"
        hint = "name them as timm, transformers or torch do, or use dvf.nn.MultiHeadAttention"
        raise usage_error("model", wanted, type(model).__name__, hint)
    return [
        AttentionLayer(
            i, n, m, p, _output_of(model, n, m), _QUERY_READS.get(qualified_class_name(m), "all")
        )
        for i, (n, m, p) in enumerate(found)
    ]


def choose_layers(model: nn.Module, layers: str | Integers) -> list[AttentionLayer]:
    """Look up the layers that ``"last"``, ``"all"`` or indices (negative allowed) name.

    Raises:
        UsageError: an unknown word, no index, one that is repeated or out of range, or another type.
    """
    every = attention_layers(model)
    if isinstance(layers, str):
        if layers not in ("last", "all"):
            wanted = "'last', 'all' or a list of indices"
            raise usage_error("layers", wanted, repr(layers), "check the spelling")
        return every if layers == "all" else every[-1:]
    given = as_list(layers, len(every))
    if not given:
        got = describe(layers if given is None else given)
        raise usage_error("layers", "'last', 'all' or a list of indices", got, "name a layer")
    chosen = [layer_index(index, len(every)) for index in given]
    if len(set(chosen)) < len(chosen):
        raise usage_error("layers", "each layer once", describe(given), "remove the repetition")
    return [every[index] for index in sorted(chosen)]


def blocks_from(model: nn.Module, first: AttentionLayer) -> list[nn.Module]:
    """The modules that contain the attention layers of ``model`` from ``first`` up; or ``model`` itself."""
    names = [layer.name.rpartition(".")[0] for layer in attention_layers(model)[first.index :]]
    return [model.get_submodule(name) for name in dict.fromkeys(names)]


def layer_index(index: Any, count: int) -> int:
    """``index`` counted from the front.

    Raises:
        UsageError: not an integer, or outside ``-count .. count - 1``.
    """
    number = whole_number(index)
    if number is None or not -count <= number < count:
        wanted = f"layer indices from {-count} to {count - 1}"
        raise usage_error(
            "layers", wanted, describe([index])[1:-1], f"there are {count} attention layers"
        )
    return number % count


def head_count(module: nn.Module) -> int:
    """The head count H of a module; 0 if it has none."""
    for name in HEAD_COUNTS:
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    return 0


def plain_class(module: nn.Module) -> type:
    """The class that ``module`` has outside every ``Attachment``."""
    return plain_class_of(type(module))


def plain_class_of(cls: type) -> type:
    return cls.__dict__.get("_plain_class", cls)


def is_hooked(modules: Iterable[nn.Module]) -> bool:
    """True if one of ``modules`` has a forward or backward hook."""
    return any(map(has_hooks, modules))


HEAD_COUNTS = ("num_heads", "num_attention_heads")
_TRIPLES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_OUTPUTS = ("proj", "out_proj", "o_proj", "attn_out_proj")
_QUERY_READS = {
    "timm.models.cait.ClassAttn": "first",
    "timm.layers.attention_pool.AttentionPoolLatent": "another",
    "torch.nn.modules.activation.MultiheadAttention": "another",  # where query is not key
}


def qualified_class_name(module: nn.Module) -> str:
    """The full name of a module's class, without the wrappings of attachments and FSDP2."""
    classes = plain_class(module).__mro__
    cls = next(c for c in classes if not c.__module__.startswith("torch.distributed"))
    return f"{cls.__module__}.{cls.__qualname__}"


def _projections(module: nn.Module) -> tuple[Projection, ...]:
    """The projections of an attention module; empty for any other module."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            return (Projection(module, "in_proj_weight", "qkv"),)
        return tuple(Projection(module, f"{r}_proj_weight", r) for r in "qkv")
    if not head_count(module):
        return ()
    if _linear(module, "qkv"):
        return (Projection(module.get_submodule("qkv"), "weight", "qkv"),)
    for names in _TRIPLES:
        if all(_linear(module, name) for name in names):
            pairs = zip(names, "qkv", strict=True)
            return tuple(Projection(module.get_submodule(n), "weight", r) for n, r in pairs)
    if _linear(module, "kv"):
        query = (
            (Projection(module.get_submodule("q"), "weight", "q"),) if _linear(module, "q") else ()
        )
        return (*query, Projection(module.get_submodule("kv"), "weight", "kv"))
    if _linear(module, "in_proj") and len(getattr(module, "in_split", ())) == 4:
        return (Projection(module.get_submodule("in_proj"), "weight", "qkv"),)
    return ()


def _linear(module: nn.Module, name: str) -> bool:
    """True if ``module.name`` is a linear layer with PyTorch's own forward."""
    child = getattr(module, name, None)
    return isinstance(child, nn.Linear) and plain_class(child).forward is nn.Linear.forward


def _output_of(model: nn.Module, name: str, module: nn.Module) -> nn.Linear | None:
    for attribute in _OUTPUTS:
        found = getattr(module, attribute, None)
        if isinstance(found, nn.Linear):
            return found
    parent: Any = model.get_submodule(name.rpartition(".")[0])
    found = getattr(getattr(parent, "output", None), "dense", None)  # transformers' older layout
    return found if isinstance(found, nn.Linear) else None
