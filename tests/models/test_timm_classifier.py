"""timm models as classifiers: images prepared as timm says, heads alone as masking says, files whole."""

import json

import pytest
import torch
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_fast.models import DiverseViT, TimmClassifier, timm_last_block

timm = pytest.importorskip("timm")


def made(name: str = "test_vit", size: int | None = 64, **options) -> TimmClassifier:
    torch.manual_seed(0)
    model = TimmClassifier(name, (64, 32), 3, size, **options).eval()
    torch.nn.init.normal_(model.model.get_classifier().weight)
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):  # of layer scale: nearly 0 at first
            torch.nn.init.ones_(parameter)
    return model


@pytest.fixture
def images(generator):
    return torch.rand(4, 3, 64, 32, generator=generator)


@pytest.mark.parametrize(
    ("image_size", "size", "found"),
    [
        ((64, 32), 64, (64, 32)),
        ((64, 32), 32, (32, 16)),
        ((64, 32), 48, (48, 32)),  # 24 is between one and two patches of 16
        ((32, 64), 80, (32, 80)),
        ((64, 64), None, (160, 160)),
        ((640, 16), 64, (64, 16)),  # at least one patch
    ],
)
def test_images_keep_their_shape_in_whole_patches(image_size, size, found):
    assert TimmClassifier("test_vit", image_size, 2, size).input_size == found


def test_images_are_resized_and_normalised_as_timm_says(images):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    model = made("vit_tiny_patch16_224", 96)
    cfg = model.model.pretrained_cfg
    resized = functional.resize(images, [96, 48], interpolation=3, antialias=True).clamp(0, 1)
    assert cfg["interpolation"] == "bicubic"
    wanted = functional.normalize(resized, cfg["mean"], cfg["std"])
    assert torch.allclose(model.prepare(images), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "eva02_tiny_patch14_224"])
def test_head_logits_are_those_of_masked_heads(name, images):
    """By the class token alone, by PrefixCache where the tokens are averaged, and in another architecture."""
    model = made(name, 56 if name.startswith("eva") else 64)
    found = model.head_logits(images)
    heads = len(found) - 1
    kept = [list(range(heads)), *([head] for head in range(heads))]
    with torch.no_grad():
        for logits, which in zip(found, kept, strict=True):
            with dvf.keep_heads(model, {-1: which}):
                assert torch.allclose(model(images), logits, atol=1e-5)
    assert not torch.allclose(found[1], found[2], atol=1e-3)


def test_what_follows_the_trunk_is_the_model_of_its_tokens(images):
    model = made()
    last = timm_last_block.without_trunk(model.model)
    tokens = timm_last_block.tokens(model.model, model.prepare(images))
    assert tokens.shape == (4, 1 + 8, 64)
    assert torch.allclose(last(tokens), model(images), atol=1e-6)
    assert torch.allclose(
        timm_last_block.head_logits(last, tokens), model.head_logits(images), atol=1e-6
    )
    assert len(last.blocks) == 1
    names = timm_last_block.whole_names(model.model, last.state_dict())
    whole = model.model.state_dict()
    assert {name.split(".")[0] for name in names} == {"blocks", "norm", "head"}
    assert all(torch.equal(x, whole[name]) for name, x in names.items())


def test_the_part_is_a_copy(images):
    model = made()
    before = model(images)
    with torch.no_grad():
        for parameter in timm_last_block.without_trunk(model.model).parameters():
            parameter.zero_()
    assert torch.equal(model(images), before)


def test_penalty_of_the_part_is_that_of_the_whole(images):
    model = made()
    last = timm_last_block.without_trunk(model.model)
    tokens = timm_last_block.tokens(model.model, model.prepare(images)).detach()
    found = []
    for one, inputs in ((model, images), (last, tokens)):
        diversity = dvf.HeadDiversity(one)
        with diversity:
            logits = one(inputs)
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])) + 3 * diversity.penalty(logits)
        loss.backward()
        found.append([diversity.cosines[-1], one.blocks[-1].attn.qkv.weight.grad])
    for whole, part in zip(*found, strict=True):
        assert torch.allclose(whole, part, rtol=1e-4, atol=1e-6)
    assert found[0][1].abs().max() > 0


@pytest.mark.parametrize("pruned", [False, True])
def test_a_file_holds_all_of_it(pruned, images, tmp_path):
    model = made(pretraining="weights of x.pth")
    if pruned:
        dvf.prune_heads(model, {-1: [1]})
    model.save(tmp_path / "x.safetensors")
    state = torch.random.get_rng_state()
    again = TimmClassifier.load(tmp_path / "x.safetensors").eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.config == model.config
    assert torch.equal(again(images), model(images))
    timms = timm.create_model("test_vit", num_classes=3, img_size=(64, 32)).eval()
    dvf.load_pruned(timms, tmp_path / "x.safetensors")
    assert torch.equal(timms(model.prepare(images)), model(images))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_shape_of_images_is_checked(mode, images):
    model = made()
    getattr(model, mode)()
    for wrong in (images[:, :1], images[..., :16], images[0]):
        with pytest.raises(UsageError, match=r"images: expected shape \[B, 3, 64, 32\]"):
            model(wrong)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("resnet18", None, "model: expected a vision transformer of timm, got 'resnet18'"),
        ("vit_of_mine", None, "model: expected timm: and a model that timm knows"),
        ("hf-hub:timm/test_vit", None, "model: expected timm: and a model that timm knows"),
        ("test_vit.nothing", None, "Invalid pretrained tag"),
        ("test_vit", 60, "img_size: expected a multiple of the patch size 16.*got 60; try 48"),
        ("test_vit", 2**20, "img_size: expected"),
    ],
)
def test_what_is_no_such_model_is_one_line(name, size, said):
    with pytest.raises(UsageError, match=said) as error:
        TimmClassifier(name, (64, 32), 2, size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "no JSON object"),
        ("{", "no JSON object"),
        ('{"name": "test_vit"}', "TypeError"),
        ('{"name": 3, "image_size": [64, 32], "num_classes": 3}', "got 3"),
        ('{"name": "test_vit", "image_size": 3, "num_classes": 3}', "TypeError"),
        ('{"name": "resnet18", "image_size": [64, 32], "num_classes": 3}', "vision transformer"),
        ('{"name": "test_vit2", "image_size": [64, 32], "num_classes": 3}', "tensors"),
    ],
)
def test_a_crafted_configuration_is_one_line(config, said, tmp_path):
    path = tmp_path / "x.safetensors"
    dvf.save_pruned(made(size=None).model, path, metadata={"timm_classifier": config})
    with pytest.raises(UsageError, match=said) as error:
        TimmClassifier.load(path)
    assert "\n" not in str(error.value)


def test_another_kind_of_file_is_one_line(tmp_path):
    DiverseViT(depth=1).save(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="expected a timm model's file"):
        TimmClassifier.load(tmp_path / "x.safetensors")


def test_metadata_of_the_file_say_which_model_it_is(tmp_path):
    made().save(tmp_path / "x.safetensors")
    header = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    said = json.loads(header[8 : 8 + length])["__metadata__"]["timm_classifier"]
    assert json.loads(said)["name"] == "test_vit"
