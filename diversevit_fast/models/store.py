"""Saving and loading our own models: one safetensors file that also says what to build.

The metadata holds ``config`` (the constructor's arguments) and ``kept_heads`` (layer -> heads, for
the layers that were pruned), both JSON.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import UsageError, require
from .restore import StrPath, check_tensors, existing_file, misfit, skeleton

if TYPE_CHECKING:
    from .diverse_vit import DiverseViT


def save(model: "DiverseViT", path: StrPath) -> None:
    """See ``DiverseViT.save``. The file appears complete or not at all."""
    safetensors = require("safetensors.torch", extra="train")
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise misfit(path, "a file name in an existing folder", "none", "make its folder first")
    heads = model.config["num_heads"]
    kept = {layer: kept for layer, kept in model.kept_heads.items() if len(kept) < heads}
    metadata = {
        "format": "pt",
        "config": json.dumps(model.config),
        "kept_heads": json.dumps(kept),
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(safetensors.save(tensors, metadata=metadata))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: StrPath, build: "type[DiverseViT]") -> "DiverseViT":
    """See ``DiverseViT.load``. Heads are pruned first, so that the shapes are the file's."""
    metadata, tensors = _read(path)
    cure = "pass a file that DiverseViT.save wrote"
    try:
        config = json.loads(metadata["config"])
        kept = {int(layer): heads for layer, heads in json.loads(metadata["kept_heads"]).items()}
        model = skeleton(build, config, kept)
    except KeyError as missing:
        raise misfit(path, f"metadata {missing}", "a file without", cure) from None
    except (AttributeError, TypeError, ValueError) as failure:
        if isinstance(failure, UsageError):
            raise misfit(path, "a valid configuration", f"({failure})", cure) from None
        got = f"one that does not parse ({type(failure).__name__})"
        raise misfit(path, "a configuration of DiverseViT", got, cure) from None
    check_tensors(path, tensors, {key: x.shape for key, x in model.state_dict().items()})
    model.load_state_dict(tensors, assign=True)
    return model


def _read(path: StrPath) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors; the tensors are copies, which outlive the file."""
    safetensors: Any = require("safetensors", extra="train")
    file = existing_file(path)
    try:
        with safetensors.safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key).clone() for key in content.keys()}  # noqa: SIM118
            return content.metadata() or {}, tensors
    except safetensors.SafetensorError:
        cure = "pass a file that DiverseViT.save wrote"
        raise misfit(path, "an intact safetensors file", "another or a damaged one", cure) from None
