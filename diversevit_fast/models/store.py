"""Save and load ``DiverseViT`` as one safetensors file that also holds its configuration.

The metadata hold ``config`` (the constructor's arguments) and ``kept_heads`` (layer -> heads, for the
layers that were pruned), both as JSON.
"""

import json
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..weight_files import StrPath, path_error, read_tensors, write_tensors
from .restore import check_tensors, skeleton

if TYPE_CHECKING:
    from .diverse_vit import DiverseViT


def save(model: "DiverseViT", path: StrPath) -> None:
    """Implement ``DiverseViT.save``. The file appears complete or not at all."""
    heads = model.config["num_heads"]
    kept = {layer: kept for layer, kept in model.kept_heads.items() if len(kept) < heads}
    metadata = {"config": json.dumps(model.config), "kept_heads": json.dumps(kept)}
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(path, tensors, metadata)


def load(path: StrPath, build: "type[DiverseViT]") -> "DiverseViT":
    """Implement ``DiverseViT.load``. Heads are pruned first, so that shapes are the file's."""
    hint = "pass a file that DiverseViT.save wrote"
    metadata, tensors = read_tensors(path, hint)
    try:
        config = json.loads(metadata["config"])
        kept = {int(layer): heads for layer, heads in json.loads(metadata["kept_heads"]).items()}
        model = skeleton(build, config, kept)
    except KeyError as missing:
        raise path_error(path, f"metadata {missing}", "a file without", hint) from None
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as failure:
        if isinstance(failure, UsageError):
            raise path_error(path, "a valid configuration", f"({failure})", hint) from None
        got = f"one that does not parse ({type(failure).__name__})"
        raise path_error(path, "a configuration of DiverseViT", got, hint) from None
    check_tensors(path, tensors, {key: x.shape for key, x in model.state_dict().items()})
    model.load_state_dict(tensors, assign=True)
    return model
