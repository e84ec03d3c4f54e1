"""Check the sizes of a ``DiverseViT`` and estimate its memory, before it is built."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import usage_error

MOST_PARAMETERS = 10**11  # 400 GB in float32
_MOST = {"depth": 1000, "num_heads": 1000}
_WIDEST = 2**20  # any other size


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Check each size by itself: a whole number within its limits.

    Raises:
        UsageError: one is not.
    """
    for name, size in sizes.items():
        most = _MOST.get(name, _WIDEST)
        if not _whole(size, most):
            wanted = f"an integer from 1 to {most}"
            raise usage_error(name, wanted, reprlib.repr(size), "pass such a number")


def check_switch(name: str, value: object) -> None:
    """Check that ``value`` is True or False.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, bool):
        raise usage_error(name, "True or False", reprlib.repr(value), "pass a bool")


def check_config(config: Mapping[str, Any]) -> None:
    """Check that the arguments of ``DiverseViT`` fit each other.

    Raises:
        UsageError: a size out of its limits, an image that is no whole number of patches, or more
            parameters than any machine holds.
    """
    check_sizes({k: v for k, v in config.items() if k not in ("image_size", "last_residual")})
    check_switch("last_residual", config["last_residual"])
    image_size, patch = config["image_size"], config["patch_size"]
    pair = isinstance(image_size, Sequence) and len(image_size) == 2
    if not pair or not all(_whole(n, _WIDEST) and n % patch == 0 for n in image_size):
        wanted = f"(height, width), positive multiples of patch_size={patch}, at most {_WIDEST}"
        got = reprlib.repr(image_size)
        raise usage_error("image_size", wanted, got, "resize the images or the patches")
    if (count := parameters(config)) > MOST_PARAMETERS:
        wanted = f"a model of at most {MOST_PARAMETERS:.0e} parameters"
        raise usage_error("dim, depth, ...", wanted, f"{count:.0e}", "make it smaller")


def parameters(config: Mapping[str, Any]) -> int:
    """The number of parameters of the model of ``config``, before any pruning."""
    D, mlp, classes = config["dim"], config["mlp_dim"], config["num_classes"]
    heads = config["num_heads"] * config["head_dim"]
    block = 4 * heads * D + D + 2 * mlp * D + mlp + D + 4 * D
    embedding = (config["patch_size"] ** 2 * config["channels"] + 1) * D + (_tokens(config) + 1) * D
    return embedding + config["depth"] * block + 2 * D + (D + 1) * classes


def training_bytes(config: Mapping[str, Any], batch: int) -> int:
    """A lower bound on the memory of training in float32 with Adam.

    It counts weights, gradients and Adam's two moments, and the activations of ``batch`` images that the
    backward needs: of each block its input, q, k, v, the head outputs and the hidden layer of the MLP.
    """
    heads = config["num_heads"] * config["head_dim"]
    kept = config["depth"] * (config["dim"] + 4 * heads) + (config["depth"] - 1) * config["mlp_dim"]
    return 4 * (4 * parameters(config) + batch * _tokens(config) * kept)


def _tokens(config: Mapping[str, Any]) -> int:
    height, width = config["image_size"]
    return 1 + (height // config["patch_size"]) * (width // config["patch_size"])


def _whole(size: object, most: int) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= most
