"""Probe the heads of a run's weights; the results lie beside them, as JSON and CSV.

``erm-seed0.safetensors`` has ``erm-seed0.probes.json`` and ``erm-seed0.probes.csv``. Beside the table the JSON file
holds what the report draws: accuracies of all subsets of the last layer's heads, and attention maps of a few images.
It says which weights, data and options it belongs to, so that work that is done is not done again.
"""

import base64
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attachment.attention_modules import choose_layers
from ..attachment.capture import capture_heads
from ..data import batches
from ..errors import UnsupportedError, UsageError
from ..files import FileError, path_exists
from ..heads.prefix_cache import PrefixCache
from ..models import DiverseViT
from ..probes.head_probes import HeadProbes
from ..probes.measures import patch_grid
from ..probes.probe_heads import probe_heads
from ..version import __version__
from .model_files import load_model
from .run_files import digest_of

SPLIT = "test_ood"  # core and spurious attribute are independent there
TESTS = ("test_id", "test_ood")
MOST_HEADS = 8  # of whose subsets all are evaluated
_BATCH = 256
_LONGEST = 96  # pixels of an image in a file
_EXAMPLES = 4


def probes_path(weights: Path) -> Path:
    """Return where the probes of a file of weights lie."""
    return weights.with_suffix(".probes.json")


def probe_weights(
    weights: Path,
    model: nn.Module,
    splits: Mapping[str, Any],
    *,
    split: str = SPLIT,
    layers: str = "last",
    swaps: bool = False,
) -> tuple[HeadProbes, bool]:
    """Probe the heads of ``model``, and write the results beside its ``weights``, unless they are there.

    Args:
        weights: the file that ``model`` was read from.
        splits: the data; ``split`` names what is probed.
        swaps: also replace the halves of dominoes.

    Returns:
        The probes, and whether they were there.

    Raises:
        UsageError, UnsupportedError: as ``probe_heads``; the system refuses to write.
    """
    dataset, path = splits[split], probes_path(weights)
    origin = {
        "weights": digest_of(weights),
        "data": _digest(splits, dict.fromkeys((split, *TESTS))),
        "options": {"split": split, "layers": layers, "swaps": swaps},
        "version": __version__,
    }
    if path_exists(path) and path_exists(path.with_suffix(".csv")):
        with suppress(UsageError):  # a damaged file is made again
            found = HeadProbes.from_json(path)
            if found.extra.get("origin") == origin:
                return found, True
    device = next(model.parameters()).device
    regions = regions_of(dataset)
    probes = probe_heads(
        model,
        ((images.to(device), *rest) for images, *rest in batches(dataset, _BATCH)),
        attributes_of(dataset),
        layers=layers,
        regions=regions,
        swaps="regions" if swaps and regions else None,
    )
    probes.extra.update(
        origin=origin,
        subsets=subset_accuracies(model, splits),
        examples=examples(model, dataset),
    )
    probes.to_csv(path.with_suffix(".csv"))
    probes.to_json(path)
    return probes, False


def attributes_of(dataset: Any) -> dict[str, Tensor]:
    """Return the label as ``core``, and as ``spurious`` the digit, or the attribute that an image folder names.

    The latter is left out if it has values that are no class, since no prediction agrees with them.
    """
    spurious = getattr(dataset, "digits", getattr(dataset, "attributes", None))
    if spurious is None or not 0 <= spurious.min() <= spurious.max() < dataset.num_classes:
        return {"core": dataset.labels}
    return {"core": dataset.labels, "spurious": spurious}


def regions_of(dataset: Any) -> dict[str, Tensor] | None:
    """Return the halves of dominoes as masks, the digit's above the photograph's; None for other images."""
    if not hasattr(dataset, "digits"):
        return None
    upper = torch.zeros(tuple(dataset.image_size), dtype=torch.bool)
    upper[: len(upper) // 2] = True
    return {"core": ~upper, "spurious": upper}


@torch.no_grad()
def subset_accuracies(model: nn.Module, splits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the accuracy of every subset of the last layer's heads on both test sets; none of many heads."""
    (layer,) = choose_layers(model, "last")
    if layer.num_heads > MOST_HEADS:
        return []
    every = range(layer.num_heads)
    subsets = [list(s) for s in chain(*(combinations(every, n + 1) for n in every))]
    found: list[dict[str, Any]] = [{"heads": subset} for subset in subsets]
    device = next(model.parameters()).device
    for split in TESTS:
        hits = torch.zeros(len(subsets), dtype=torch.long)
        for images, labels, _ in batches(splits[split], _BATCH):
            images = images.to(device)
            if isinstance(model, DiverseViT):
                logits: Any = model.subset_logits(images, subsets)
            else:
                cache = PrefixCache(model, [layer])
                with cache:
                    logits = list(cache.outputs([{layer.index: s} for s in subsets], images))
            for i, one in enumerate(logits):
                hits[i] += (one.argmax(-1).cpu() == labels).sum()
        for row, hit in zip(found, hits.tolist(), strict=True):
            row[split] = hit / len(splits[split])
    return found


def examples(model: nn.Module, dataset: Any) -> list[dict[str, Any]]:
    """Return the first image of each of the first groups, with the class token's attention of the last layer.

    Each has ``"group"``, ``"image"`` (bytes of uint8 ``[height, width, 3]`` in base64, with its ``"size"``) and
    ``"maps"``, ``[H][rows][columns]`` over the patches. Empty if the tokens are no grid of patches.
    """
    device = next(model.parameters()).device
    groups = [g for g in range(len(dataset.group_names)) if (dataset.groups == g).any()]
    chosen = [int((dataset.groups == g).nonzero()[0]) for g in groups[:_EXAMPLES]]
    images = dataset.images[chosen].float() / 255
    with torch.no_grad(), capture_heads(model, "last", maps="class") as heads:
        model(images.to(device))
    rows = heads.maps[0][:, :, 0, getattr(model, "num_prefix_tokens", 1) :].cpu()
    try:
        grid = patch_grid(images.shape[-2], images.shape[-1], rows.shape[-1])
    except UsageError:
        return []
    longest = max(images.shape[-2:])
    if longest > _LONGEST:
        images = F.interpolate(images, scale_factor=_LONGEST / longest, mode="area")
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return [
        {
            "group": dataset.group_names[group],
            "size": list(image.shape[:2]),
            "image": base64.b64encode(image.numpy().tobytes()).decode("ascii"),
            "maps": [
                [[round(x, 5) for x in r] for r in m] for m in maps.unflatten(-1, grid).tolist()
            ],
        }
        for group, image, maps in zip(groups, pixels, rows, strict=False)
    ]


def try_to_probe(weights: Path, splits: Mapping[str, Any], device: torch.device) -> str | None:
    """Probe what was just trained; return a line that says why, where that cannot be done.

    Raises:
        FileError: the system refuses to write the results.
    """
    try:
        probe_weights(weights, load_model(str(weights)).to(device), splits)
    except FileError:
        raise
    except (UsageError, UnsupportedError) as failure:
        return f"no probes of {weights.stem}: {failure}"
    return None


def read_probes(folder: Path, names: list[str]) -> dict[str, HeadProbes]:
    """Return the probes of the trainings ``names`` that are there.

    Raises:
        UsageError: one is damaged.
    """
    paths = {name: folder / f"{name}.probes.json" for name in names}
    return {name: HeadProbes.from_json(p) for name, p in paths.items() if path_exists(p)}


def _digest(splits: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in names:
        for tensor in (splits[name].images, splits[name].labels, splits[name].groups):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
