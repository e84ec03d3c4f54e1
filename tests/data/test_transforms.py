"""Transforms: what stays of an image, where, and normalised how."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("PIL.Image")

from PIL import Image

from diversevit_fast.data import GroupFolder, vit_transforms
from diversevit_fast.errors import UsageError

from ..helpers.group_folders import make_group_folder


def ramp(width: int, height: int):
    """Red grows from left to right and green from top to bottom, from 0 to 255."""
    columns = torch.linspace(0, 255, width).round().to(torch.uint8)
    rows = torch.linspace(0, 255, height).round().to(torch.uint8)
    pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
    pixels[..., 0], pixels[..., 1] = columns, rows[:, None]
    return Image.fromarray(pixels.numpy())


def test_evaluation_keeps_the_centre_and_not_the_aspect():
    """A sixteenth is cut off at each side: of 256 pixels 16, whatever the image's shape."""
    image = vit_transforms(normalisation=((0.0,) * 3, (1.0,) * 3))(ramp(300, 120))
    assert image.shape == (3, 224, 224)
    assert image.dtype == torch.float32
    red, green, blue = image
    assert torch.allclose(red[0], torch.linspace(16.5 / 256, 239.5 / 256, 224), atol=0.01)
    assert torch.allclose(green[:, 0], red[0], atol=0.01)
    assert not blue.any()


def test_without_a_crop():
    image = vit_transforms(32, resize=32, normalisation=((0.0,) * 3, (1.0,) * 3))(ramp(64, 64))
    assert float(image[0, 0, 0]) < 0.02
    assert float(image[0, 0, -1]) > 0.98


def test_normalisations():
    grey = Image.new("RGB", (8, 8), (51, 102, 204))  # 0.2, 0.4, 0.8
    half = vit_transforms(8, normalisation="half")(grey)[:, 0, 0]
    assert torch.allclose(half, torch.tensor([-0.6, -0.2, 0.6]), atol=1e-6)
    usual = vit_transforms(8)(grey)[:, 0, 0]
    wanted = [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0.8 - 0.406) / 0.225]
    assert torch.allclose(usual, torch.tensor(wanted), atol=1e-5)


def test_training_crops_and_flips_at_random():
    plain = {"normalisation": ((0.0,) * 3, (1.0,) * 3), "train": True}
    torch.manual_seed(0)
    images = [vit_transforms(16, **plain)(ramp(64, 64)) for _ in range(40)]
    flipped = [bool(image[0, 0, 0] > image[0, 0, -1]) for image in images]
    assert 8 < sum(flipped) < 32
    shares = [(i[0].amax() - i[0].amin()) * (i[1].amax() - i[1].amin()) for i in images]
    assert len({round(float(share), 3) for share in shares}) > 20
    assert min(shares) > 0.5  # of 0.7
    small = vit_transforms(16, scale=(0.05, 0.06), **plain)(ramp(64, 64))
    assert (small[0].amax() - small[0].amin()) * (small[1].amax() - small[1].amin()) < 0.1


def test_in_a_folder(tmp_path):
    data = GroupFolder(make_group_folder(tmp_path / "own"), transform=vit_transforms(32))
    images, _, _ = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
    assert images.shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"img_size": 0}, "img_size: expected a whole number"),
        ({"resize": 100}, "resize: expected at least img_size, 224"),
        ({"normalisation": "cifar"}, "normalisation: expected one of imagenet, half"),
        ({"scale": (0.9, 0.5)}, "scale: expected two shares"),
        ({"scale": (0.0, 0.5)}, "scale: expected two shares"),
    ],
)
def test_mistakes(options, said):
    with pytest.raises(UsageError) as caught:
        vit_transforms(**options)
    assert str(caught.value).startswith(said)
