"""The measures of a head, as functions of tensors: how much it uses, holds and attends to an attribute."""

import math

import torch
from torch import Tensor

from ..errors import require, usage_error


def agreement(predicted: Tensor, attribute: Tensor, weights: Tensor) -> float:
    """Return the weighted share of images on which the prediction ``[n]`` is the attribute's value ``[n]``."""
    return float(((predicted == attribute) * weights).sum() / weights.sum())


def prevalence(predicted: Tensor, weights: Tensor) -> tuple[int, float]:
    """Return the most frequent prediction, and the weighted share of images that get it."""
    shares = torch.zeros(int(predicted.max()) + 1, dtype=torch.float64)
    shares.index_add_(0, predicted, weights)
    return int(shares.argmax()), float(shares.max() / shares.sum())


def linear_cka(outputs: Tensor) -> Tensor:
    """Linear centred kernel alignment of every pair of heads (Kornblith et al., arXiv 1905.00414, section 3).

    With centred outputs X, Y of two heads: ``|Yᵀ X|² / (|Xᵀ X| |Yᵀ Y|)`` in Frobenius norms. 1 for outputs that
    are a rotation and a scaling of each other, 0 for uncorrelated ones; NaN for a head that is constant.

    Args:
        outputs: ``[n, H, d]``, one output of each head for each of n images.

    Returns:
        float64 ``[H, H]``.
    """
    n, H, d = outputs.shape
    centred = outputs.double() - outputs.double().mean(0)
    scale = centred.square().sum((0, 2)).sqrt()
    rounding = outputs.double().square().sum((0, 2)).sqrt() * torch.finfo(outputs.dtype).eps
    constant = scale <= 4 * rounding
    centred = centred / scale.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    flat = centred.reshape(n, H * d)
    products = (flat.T @ flat).view(H, d, H, d).square().sum((1, 3))  # |Xᵀ Y|²
    norms = products.diagonal().sqrt()
    found = products / (norms[:, None] * norms)
    found[constant], found[:, constant] = math.nan, math.nan
    return found


def halves(cell: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random half of each combination ``cell`` ``[n]``: True for images to fit probes on, bool ``[n]``.

    Raises:
        UsageError: a combination has one image only.
    """
    fitted = torch.zeros(len(cell), dtype=torch.bool)
    for value in range(int(cell.max()) + 1):
        members = (cell == value).nonzero().flatten()
        if len(members) < 2:
            wanted = (
                "at least two images of every combination of attributes, to fit and to test probes"
            )
            raise usage_error("loader", wanted, "one", "take more images, or decode=False")
        order = members[torch.randperm(len(members), generator=generator)]
        fitted[order[: len(order) // 2]] = True
    return fitted


def decodability(
    outputs: Tensor, attribute: Tensor, fitted: Tensor, weights: tuple[Tensor, Tensor]
) -> float:
    """Return the accuracy of a linear classifier of ``attribute`` on images it was not fitted on.

    Args:
        outputs: ``[n, d]``, of one head.
        attribute: ``[n]``.
        fitted: bool ``[n]``, the images to fit on; the others are the test.
        weights: of the images of either part, in order, each of sum 1.
    """
    pipeline = require("sklearn.pipeline", extra="train")
    linear = require("sklearn.linear_model", extra="train")
    scaling = require("sklearn.preprocessing", extra="train")
    classifier = pipeline.make_pipeline(
        scaling.StandardScaler(), linear.LogisticRegression(max_iter=1000)
    )
    known = outputs[fitted].double().numpy()
    weight = weights[0].numpy() * len(known)
    classifier.fit(known, attribute[fitted].numpy(), logisticregression__sample_weight=weight)
    predicted = torch.from_numpy(classifier.predict(outputs[~fitted].double().numpy()))
    return agreement(predicted, attribute[~fitted], weights[1])


def patch_shares(masks: Tensor, patches: int) -> Tensor:
    """Return which share of each patch lies in a region: float64 ``[m, patches]``.

    Args:
        masks: bool ``[m, height, width]``.
        patches: square ones, row by row.

    Raises:
        UsageError: the image is not that number of square patches.
    """
    height, width = masks.shape[1:]
    rows, columns = patch_grid(height, width, patches)
    grid = masks.double().reshape(-1, rows, height // rows, columns, width // columns)
    return grid.mean((2, 4)).flatten(1)


def patch_grid(height: int, width: int, patches: int) -> tuple[int, int]:
    """Return how many rows and columns ``patches`` square patches of an image have.

    Raises:
        UsageError: the image is not that number of square patches.
    """
    side = math.isqrt(height * width // max(1, patches))
    if side == 0 or height % side or width % side or (height // side) * (width // side) != patches:
        got = f"images of {height} x {width} and {patches} tokens"
        hint = "leave regions out for a model that has no such patches"
        raise usage_error("regions", "images of square patches, one token each", got, hint)
    return height // side, width // side


def attention_mass(rows: Tensor, shares: Tensor, prefix: int) -> Tensor:
    """Return which share of the attention to patches falls on a region: float64 ``[b, H]``.

    Attention that is spread evenly over the patches gives the region's share of the image.

    Args:
        rows: ``[b, H, N]``, attention of the class token.
        shares: ``[b or 1, N - prefix]`` of ``patch_shares``.
        prefix: how many tokens precede the patches; attention to these does not count.
    """
    patches = rows[..., prefix:].double()
    inside = (patches * shares[:, None]).sum(-1)
    return inside / patches.sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
