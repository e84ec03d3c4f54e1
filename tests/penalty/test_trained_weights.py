"""The penalty and its gradients at trained weights, where heads are nearly orthogonal and all is cancellation.

``data/trained_diversevit.safetensors`` is DiverseViT as ``diversevit train diversevit`` leaves it (seed 0, the last
of 20 epochs), in float16: its penalty is 5e-5. Whoever sums the tokens of one image in one order is lucky or not, so
they are summed in several: a ViT does not mind the order of its patches.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import diversevit_fast as dvf
from diversevit_fast.models import DiverseViT
from tests.helpers.regimes import assert_as_exact_as_eager

WEIGHTS = Path(__file__).with_name("trained_diversevit.safetensors")
ORDERS = 4


def trained() -> DiverseViT:
    with safe_open(WEIGHTS, "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = DiverseViT(**config)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def images():
    pytest.importorskip("sklearn")
    data = dvf.data.DigitsPhotos("train", samples=32)
    return torch.stack([data[i][0] for i in range(16)])


def reordered(model: DiverseViT, images: torch.Tensor, seed: int):
    """The same model and images with the patches in another order, and the way back for a position's gradient."""
    (height, width), side = images.shape[2:], 8
    patches = images.unfold(2, side, side).unfold(3, side, side).flatten(2, 3)
    order = torch.randperm(patches.shape[2], generator=torch.Generator().manual_seed(seed))
    rows = patches[:, :, order].unflatten(2, (height // side, width // side))
    images = rows.transpose(3, 4).flatten(4, 5).flatten(2, 3).contiguous()
    tokens = torch.cat((torch.zeros(1, dtype=torch.long), order + 1))
    with torch.no_grad():
        model.pos_embed.copy_(model.pos_embed[:, tokens].clone())
    return model, images


def gradients(model, images, backend):
    diversity = dvf.HeadDiversity(model, layers="last")
    with dvf.use_backend(backend):
        with diversity:
            logits = model(images)
        penalty = diversity.penalty(logits)
        found = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    return penalty.detach(), dict(zip(names, found, strict=True))


def test_another_order_is_the_same_model(images):
    model, turned = reordered(trained().double(), images.double(), 0)
    expect, _ = gradients(trained().double(), images.double(), "reference")
    found, _ = gradients(model, turned, "reference")
    torch.testing.assert_close(found, expect)
    assert expect < 1e-4


def test_as_exact_as_plain_pytorch(images):
    ratios = {}
    for order in range(ORDERS):

        def of(backend, dtype=torch.float32, order=order):
            return gradients(*reordered(trained().to(dtype), images.to(dtype), order), backend)

        (_, exact), (_, plain), (_, ours) = (
            of("reference", torch.float64),
            of("reference"),
            of("auto"),
        )
        for name, truth in exact.items():
            if truth is not None and float(truth.abs().max()) > 0:
                errors = [float((x[name].double() - truth).abs().max()) for x in (ours, plain)]
                ratios.setdefault(name, []).append(errors[0] / errors[1])
    assert_as_exact_as_eager(ratios, 1.3, 2.5)
