"""Save and load pruned models, and report what pruning saves.

No constructor builds a pruned model, so the metadata of the safetensors file say which heads are left
(``pruned_layers``, JSON), and loading prunes a fresh model first. A tensor that the model uses under
several names is stored once, as ``safetensors.torch.save_model`` does.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from .._torch_internals import cpu_flash_attention, overload_of
from ..attachment.attention_modules import AttentionLayer, attention_layers
from ..attachment.indices import whole_number
from ..attachment.parallel import unwrap
from ..errors import UnsupportedError, UsageError
from ..ops.attention import attention_operator
from ..ops.attention_qkvpacked import attention_qkvpacked_operator
from ..version import __version__
from ..weight_files import StrPath, listing, path_error, read_tensors, write_tensors
from .pruning import Heads, check_kept, prune_heads


@dataclass(frozen=True)
class _PrunedLayer:
    """The entry of one pruned layer in the metadata."""

    layer: int
    name: str
    heads: int | None  # before any pruning, where the module says so
    kept: tuple[int, ...]


def save_pruned(
    model: nn.Module, path: StrPath, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the weights and the kept heads of every pruned layer as one safetensors file.

    The file appears complete or not at all. A model without pruned layers is saved as well.

    Args:
        model: as ``prune_heads`` left it, trained on or not.
        path: the file, in an existing folder; replaced if it exists.
        metadata: further entries for the file's header.

    Raises:
        UsageError: the folder does not exist, the file cannot be written, or safetensors is not
            installed.
        UnsupportedError: state that is not whole dense tensors (sharded, quantised, extra state), or
            tensors that share a part of their memory.
    """
    model = unwrap(model)
    state = _state(model)
    stored = _stored_names(state)
    layers = [vars(layer) for layer in _pruned_layers(model)]
    entries = {**(metadata or {}), **{k: first for k, first in stored.items() if k != first}}
    entries |= {_VERSION: __version__, _LAYERS: json.dumps(layers)}
    tensors = {name: state[name].detach().contiguous() for name in set(stored.values())}
    try:
        write_tensors(path, tensors, entries)
    except RuntimeError as failure:
        raise UnsupportedError(
            f"model: safetensors cannot store it ({str(failure).splitlines()[0]}); clone what is shared"
        ) from None


def load_pruned(model: nn.Module, path: StrPath) -> nn.Module:
    """Prune ``model`` as the saved one was and load its weights.

    A model that is already pruned in the same way is not pruned again. If anything does not fit, ``model``
    stays as it was. Pruning makes new parameters, so build the optimizer and DDP afterwards.

    Args:
        model: of the architecture and dtype that was saved, on any device; its weights do not matter.
        path: a file of ``save_pruned``.

    Returns:
        ``model``.

    Raises:
        UsageError: no such file, one that cannot be read, or not one of ``save_pruned``; another
            architecture; a missing, an extra or a misshapen tensor; ``model`` is pruned otherwise.
        UnsupportedError: as ``prune_heads`` and ``save_pruned``.
    """
    target = unwrap(model)
    metadata, tensors = read_tensors(path, _HINT)
    heads = _heads_to_prune(path, target, _parse(path, metadata))
    pruned = _without_storage(target)
    if heads:
        prune_heads(pruned, heads, rescale=False)  # the factor is in the weights
    wanted = _state(pruned)
    given = _under_every_name(wanted, tensors)
    _check_tensors(path, given, wanted)
    _check_shared(path, given, wanted)
    if heads:
        prune_heads(target, heads, rescale=False)
    target.load_state_dict(given)
    return model


@dataclass(frozen=True)
class PrunedPart:
    """A model or layer with its parameters, and FLOPs of one forward, before and after pruning."""

    name: str
    parameters: tuple[int, int]
    flops: tuple[int, int]


@dataclass(frozen=True)
class PruningReport:
    """The savings of pruning: of the whole model, and of each pruned layer with its output projection."""

    model: PrunedPart
    layers: tuple[PrunedPart, ...]

    def __str__(self) -> str:
        rows = [("", "parameters", "", "", "FLOPs", "", "")]
        for part in (self.model, *self.layers):
            sizes = [_saving(*pair) for pair in (part.parameters, part.flops)]
            rows.append((part.name, *sizes[0], *sizes[1]))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)


def pruning_report(model: nn.Module, heads: Heads, images: Tensor) -> PruningReport:
    """Compute what ``prune_heads(model, heads)`` would save, without changing ``model``.

    FLOPs are those of products (matrix products, convolutions, attention) in one forward in eval
    mode, as ``torch.utils.flop_counter`` counts them: two for a multiplication and an addition.
    Measure time separately: it need not fall alike.

    Args:
        model, heads: as in ``prune_heads``. The model is copied.
        images: a batch for ``model``, on its device.

    Raises:
        UsageError, UnsupportedError: as ``prune_heads``.
    """
    changed = copy.deepcopy(unwrap(model)).eval()
    kept = {layer.index: which for layer, which in check_kept(changed, heads)}
    before = _measure(changed, list(kept), images)
    after = _measure(prune_heads(changed, kept), list(kept), images)
    whole, *layers = (
        PrunedPart(name, (a[0], b[0]), (a[1], b[1]))
        for (name, *a), (_, *b) in zip(before, after, strict=True)
    )
    return PruningReport(whole, tuple(layers))


def _measure(model: nn.Module, named: list[int], images: Tensor) -> list[tuple[str, int, int]]:
    """Count (name, parameters, FLOPs) of the whole model and of the layers named."""
    root = type(model).__name__
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS)
    # inside a function mode PyTorch does not take its fast path, whose products are not counted
    with torch.no_grad(), BaseTorchFunctionMode(), counter:
        model(images)
    found = counter.get_flop_counts()
    flops = {name: sum(count.values()) for name, count in found.items()}
    names = {module: name for name, module in model.named_modules()}
    measured = [(root, _count([model]), counter.get_total_flops())]
    for layer in (attention_layers(model)[index] for index in named):
        parts: list[nn.Module] = [layer.module]
        if layer.output is not None and layer.output not in set(layer.module.modules()):
            parts.append(layer.output)  # transformers' older layout
        total = sum(flops.get(f"{root}.{names[part]}", 0) for part in parts)
        measured.append((layer.name, _count(parts), total))
    return measured


def _count(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})


def _saving(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"-> {after:,}", f"({after / before - 1:+.1%})" if before else ""


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """FLOPs of two products, Nq x d x Nk and Nq x Nk x dv, for each head of each sample."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _attention_qkvpacked_flops(
    qkv: Any,
    seed: Any,
    is_causal: Any,
    scale: Any,
    dropout_p: Any,
    queries: int | None = None,
    **_: Any,
) -> int:
    B, N, _, H, d = qkv
    return _attention_flops((B, H, queries or N, d), *[(B, H, N, d)] * 2)


_ATTENTION_FLOPS = {  # operators that torch's counter does not know
    overload_of(attention_operator).overloadpacket: _attention_flops,
    overload_of(attention_qkvpacked_operator).overloadpacket: _attention_qkvpacked_flops,
    cpu_flash_attention: _attention_flops,
}
_VERSION, _LAYERS = "diversevit_fast", "pruned_layers"
_HINT = "pass a file that dvf.save_pruned wrote"


def _pruned_layers(model: nn.Module) -> list[_PrunedLayer]:
    return [
        _PrunedLayer(
            layer.index,
            layer.name,
            getattr(layer.module, "original_heads", None),
            tuple(layer.module.kept_heads),
        )
        for layer in attention_layers(model)
        if hasattr(layer.module, "kept_heads")
    ]


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with the parameters themselves, so that shared ones are the same object."""
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        plain = type(value) in (Tensor, nn.Parameter, nn.Buffer)
        if not plain or value.layout != torch.strided or value.is_quantized:
            raise UnsupportedError(
                f"model: {name} is {type(value).__name__}, not a whole dense tensor; gather or "
                "convert the model first"
            )
    return state


def _stored_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each name to the name its tensor is stored under: the first of all its names."""
    first: dict[int, str] = {}
    for name in sorted(state):
        first.setdefault(id(state[name]), name)
    return {name: first[id(tensor)] for name, tensor in state.items()}


def _under_every_name(
    wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The file's tensors, each under all names that the model has for it.

    Different tensors that a file holds under these names are kept, so that ``_check_shared`` finds them.
    """
    stored = _stored_names(wanted)
    alone = {stored[name]: tensors[name] for name in wanted if name in tensors}
    return {name: alone[first] for name, first in stored.items() if first in alone} | {**tensors}


def _without_storage(model: nn.Module) -> nn.Module:
    """Copy ``model`` to the meta device: it has shapes to compare with but no storage."""
    memo: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _parse(path: StrPath, metadata: Mapping[str, str]) -> list[_PrunedLayer]:
    if _LAYERS not in metadata:
        raise path_error(path, f"metadata {_LAYERS!r}", "a file without", _HINT)
    try:
        layers = [_PrunedLayer(**entry) for entry in json.loads(metadata[_LAYERS])]
        return [_PrunedLayer(_number(x.layer), x.name, x.heads, tuple(x.kept)) for x in layers]
    except (TypeError, ValueError) as failure:
        got = f"something that does not parse ({type(failure).__name__})"
        raise path_error(path, f"metadata {_LAYERS!r}", got, _HINT) from None


def _number(value: Any) -> int:
    number = whole_number(value)
    if number is None:
        raise TypeError(f"{value!r} is no integer")
    return number


def _heads_to_prune(
    path: StrPath, model: nn.Module, filed: list[_PrunedLayer]
) -> dict[int, list[int]]:
    """The heads to prune ``model`` to, after checking that it has the file's architecture."""
    layers: list[AttentionLayer] = attention_layers(model)
    has = {layer.layer: layer for layer in _pruned_layers(model)}
    heads: dict[int, list[int]] = {}
    hint = "build the model that was saved"
    for entry in filed:
        named = layers[entry.layer].name if 0 <= entry.layer < len(layers) else "no such layer"
        if named != entry.name:
            raise path_error(path, f"layer {entry.layer} named {named!r}", repr(entry.name), hint)
        pruned = has.pop(entry.layer, None)
        if pruned is not None:
            if pruned.kept != entry.kept:
                raise _pruned_otherwise(path, entry.name, pruned.kept, entry.kept)
            continue
        count = layers[entry.layer].num_heads
        found = {h for h in entry.kept if whole_number(h) is not None and 0 <= h < count}
        whole = entry.heads is None or whole_number(entry.heads) == count
        if not found or len(found) < len(entry.kept) or not whole:
            got = f"heads {list(entry.kept)} of {entry.heads or 'more'}"
            raise path_error(path, f"heads of the model's {count} in {entry.name}", got, hint)
        heads[entry.layer] = list(entry.kept)
    for pruned in has.values():
        raise _pruned_otherwise(path, pruned.name, pruned.kept, "all")
    return heads


def _pruned_otherwise(path: StrPath, name: str, kept: object, filed: object) -> UsageError:
    wanted = f"heads {kept} of {name}, as the model is pruned already"
    return path_error(path, wanted, filed, "load into a fresh model")


def _check_tensors(
    path: StrPath, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    hint = "build the model that was saved"
    if missing := [name for name in wanted if name not in given]:
        raise path_error(path, f"the tensors {listing(missing)}", "a file without", hint)
    if extra := [name for name in given if name not in wanted]:
        raise path_error(path, "no other tensors", listing(extra), hint)
    for name, tensor in wanted.items():
        ours, theirs = ((list(x.shape), x.dtype) for x in (tensor, given[name]))
        if ours != theirs:
            wish = f"{name} of shape {ours[0]} and {ours[1]}, the model's"
            raise path_error(path, wish, f"{theirs[0]} and {theirs[1]}", hint)


def _check_shared(path: StrPath, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, first in _stored_names(wanted).items():
        if given[name] is not given[first]:
            wish = f"one tensor for {first} and {name}, which the model shares"
            raise path_error(path, wish, "two", "build the model that was saved")
