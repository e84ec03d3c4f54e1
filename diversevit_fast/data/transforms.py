"""The usual transforms of images for vision transformers, as torchvision builds them."""

from typing import Any

import torch

from ..errors import require, usage_error
from .group_images import check_img_size

NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of each channel, by name."""


def vit_transforms(
    img_size: int = 224,
    *,
    train: bool = False,
    normalisation: str | tuple[tuple[float, ...], tuple[float, ...]] = "imagenet",
    resize: int | None = None,
    scale: tuple[float, float] = (0.7, 1.0),
) -> Any:
    """Return the transform from a ``PIL.Image`` to a normalised float32 tensor ``[3, img_size, img_size]``.

    Evaluation: resize to ``resize`` x ``resize`` without keeping the aspect ratio, crop the centre. Training: a random
    crop of ``scale`` of the area, resized, and a random flip. These are what group_DRO
    (https://github.com/kohpangwei/group_DRO) and deep feature reweighting
    (https://github.com/PolinaKirichenko/deep_feature_reweighting) do on Waterbirds; ``vit-spurious-robustness``
    (https://github.com/deeplearning-wisc/vit-spurious-robustness) takes 384 pixels without a crop (``resize=384``),
    ``normalisation="half"`` and ``scale=(0.05, 1.0)``. For a pretrained model of timm ask timm:
    ``timm.data.create_transform(**timm.data.resolve_model_data_config(model))``.

    Args:
        img_size: height and width of the result, in pixels.
        train: with augmentation.
        normalisation: ``"imagenet"``, ``"half"`` (0.5 for all), or means and standard deviations of the channels.
        resize: None is 8 / 7 of ``img_size``: 256 for 224.
        scale: least and largest share of the area that a training crop keeps.

    Raises:
        UsageError: a bad argument, or torchvision is not installed.
    """
    check_img_size(img_size)
    check_img_size(resize)
    known = isinstance(normalisation, str)
    if known and normalisation not in NORMALISATIONS:
        wanted = f"one of {', '.join(NORMALISATIONS)}, or means and deviations"
        raise usage_error("normalisation", wanted, repr(normalisation), "pick one of these")
    mean, std = NORMALISATIONS[normalisation] if known else normalisation
    wide = round(img_size * 8 / 7) if resize is None else resize
    if wide < img_size:
        raise usage_error("resize", f"at least img_size, {img_size}", resize, "make it larger")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise usage_error("scale", "two shares of the area in order", repr(scale), "try (0.7, 1.0)")
    v2 = require("torchvision.transforms.v2", extra="train")
    shape = (
        [v2.RandomResizedCrop(img_size, scale=scale), v2.RandomHorizontalFlip()]
        if train
        else [v2.Resize((wide, wide)), v2.CenterCrop(img_size)]
    )
    pixels = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*shape, *pixels, v2.Normalize(list(mean), list(std))])
