"""DiverseViT is the published forward pass, imports its weights, and survives a file."""

import inspect
import json
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diversevit_fast.errors import UsageError
from diversevit_fast.heads.pruning import prune_heads
from diversevit_fast.models import DiverseViT, published, to_published_state_dict

SMALL = {"image_size": (8, 12), "patch_size": 2, "num_classes": 3, "dim": 6, "depth": 3}
SMALL |= {"num_heads": 3, "head_dim": 5, "mlp_dim": 7}
GRAY = SMALL | {"depth": 1, "num_heads": 1, "channels": 1}
LAYER = "vit.transformer.layers.1."
TOLERANCE = 1e-10  # float64; the oracle sums in another order


def published_layer_norm(x, state, name):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def published_linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def published_patches(images, size, c_first=False):
    """Patch by patch and pixel by pixel: row, column, channel."""
    _, channels, height, width = images.shape
    side, colours = range(size), range(channels)
    pixels = [(r, c, ch) for r in side for c in side for ch in colours]
    if c_first:
        pixels = [(r, c, ch) for ch in colours for r in side for c in side]
    patches = [
        torch.stack([images[:, ch, top + r, left + c] for r, c, ch in pixels], dim=1)
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]
    return torch.stack(patches, dim=1)


def published_logits(state, images, heads, patch, keep=None, residual=False, c_first=False):
    """The published forward pass, by its own key names; ``keep``: only these last heads."""
    patches = published_patches(images, patch, c_first)
    x = published_linear(patches, state, "vit.to_patch_embedding.1")
    x = torch.cat([state["vit.cls_token"].repeat(len(x), 1, 1), x], 1) + state["vit.pos_embedding"]
    depth = sum(key.endswith("to_qkv.weight") for key in state)
    for layer in range(depth):
        name, last = f"vit.transformer.layers.{layer}", layer == depth - 1
        normed = published_layer_norm(x, state, f"{name}.0.norm")
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (normed @ state[f"{name}.0.fn.to_qkv.weight"].T).chunk(3, dim=-1)
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        output = torch.softmax(scores, -1) @ value  # [B, H, N, d]
        if last and keep is not None:
            for head in range(heads):
                output[:, head] *= heads / len(keep) if head in keep else 0.0
        y = published_linear(output.transpose(1, 2).flatten(2), state, f"{name}.0.fn.proj.0")
        x = y if last and not residual else x + y
        hidden = published_layer_norm(x, state, f"{name}.1.norm")
        hidden = published_linear(hidden, state, f"{name}.1.fn.net.0")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x = x + published_linear(hidden, state, f"{name}.1.fn.net.3")
    pooled = published_layer_norm(x[:, 0], state, "vit.mlp_head.0")
    return published_linear(pooled, state, "vit.mlp_head.1")


def build(seed=0, dtype=torch.float64, **config):
    """A model whose every parameter is random, biases and LayerNorm weights too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DiverseViT(**config).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn_like(p)
                p.copy_(p + 0.3 * noise if p.ndim == 1 else noise / p.shape[-1] ** 0.5)
    return model


def draw_images(model):
    shape = (2, model.config["channels"], *model.config["image_size"])
    generator = torch.Generator().manual_seed(1)
    return torch.rand(shape, generator=generator, dtype=model.head.weight.dtype)


def published_state(model):
    """Published names for any model's weights; the oracle is told of a residual separately."""
    weights, names = model.state_dict(), published.published_names(len(model.blocks))
    return {theirs: weights[ours].clone() for ours, theirs in names.items()}


def refused(call, *words):
    """``call`` raises a ``UsageError`` of one line that says each of ``words`` and a hint."""
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert [word for word in ("; ", *words) if word not in message] == [], message


@pytest.fixture
def model():
    return build(**SMALL)


@pytest.fixture
def images(model):
    return draw_images(model)


@pytest.fixture
def checkpoint(tmp_path):
    """Write an object as a checkpoint and read it back as the small model."""

    def read(content, heads=3, size=(8, 12)):
        torch.save(content, path := tmp_path / "weights.pth")
        return DiverseViT.from_published_checkpoint(path, num_heads=heads, image_size=size)

    return read


@pytest.mark.parametrize(
    "config",
    [{}, SMALL, GRAY, SMALL | {"patch_size": 4}, SMALL | {"last_residual": True}],
    ids=["published", "small", "one gray block", "patch 4", "last residual"],
)
def test_is_the_published_forward_pass(config):
    model = build(**config)
    images, sizes = draw_images(model), model.config
    counts, residual = (sizes["num_heads"], sizes["patch_size"]), sizes["last_residual"]
    oracle = published_logits(published_state(model), images, *counts, residual=residual)
    torch.testing.assert_close(model(images), oracle, rtol=0, atol=TOLERANCE)
    tokens = model.blocks[-1](model.features(images))
    torch.testing.assert_close(model.head(model.norm(tokens[:, 0])), oracle)


WRONG = [{"c_first": True}, {"residual": True}, {"keep": [0]}, {"heads": 5}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_the_published_oracle_bites(model, images, wrong):
    """Channel-first patches, a residual at the last attention, a lost head, another head split."""
    oracle = published_logits(published_state(model), images, **{"heads": 3, "patch": 2} | wrong)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(images), oracle, rtol=0, atol=1e-3)


@pytest.mark.parametrize("residual", [False, True])
def test_head_logits_are_the_published_masks_from_one_pass(residual):
    model, runs = build(**SMALL, last_residual=residual), []
    state, images = published_state(model), draw_images(model)
    masks = ([0, 1, 2], [0], [1], [2])
    by_hand = [published_logits(state, images, 3, 2, keep, residual) for keep in masks]
    for layer in range(3):
        model.get_submodule(f"blocks.{layer}.attn").register_forward_hook(lambda *_: runs.append(1))
    logits = model.head_logits(images)
    assert len(runs) == 3
    torch.testing.assert_close(logits, torch.stack(by_hand), rtol=0, atol=TOLERANCE)
    assert (logits[1] - logits[2]).abs().max() > 1e-3


def test_head_logits_of_a_pruned_model(model, images):
    """Each remaining head alone gives the same logits as in the whole model: 3 / 2 times 2 is 3."""
    whole = model.head_logits(images)
    prune_heads(model, {-1: [0, 2]})
    pruned = model.head_logits(images)
    torch.testing.assert_close(pruned[1:], whole[[1, 3]])
    torch.testing.assert_close(pruned[0], model(images))


def test_every_parameter_gets_a_gradient(model, images):
    F.cross_entropy(model(images), torch.tensor([0, 2])).backward()
    sizes = {n: 0 if p.grad is None else p.grad.norm().item() for n, p in model.named_parameters()}
    assert [name for name, size in sizes.items() if not 0 < size < math.inf] == []


def test_twice_differentiable(model, images):
    """The gradient of a squared input gradient is its finite difference."""
    images.requires_grad_()
    weight = model.blocks[-1].attn.qkv.weight

    def energy(create_graph=False):
        score = model(images).amax(-1).sum()
        return (torch.autograd.grad(score, images, create_graph=create_graph)[0] ** 2).sum()

    (gradient,) = torch.autograd.grad(energy(create_graph=True), weight)
    direction, step = gradient.sign(), 1e-5
    weight.data += step * direction
    above = energy()
    weight.data -= 2 * step * direction
    slope = (above - energy()) / (2 * step)
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-6, atol=0)


def test_the_defaults_are_the_published_configuration():
    model = DiverseViT()
    assert sum(p.numel() for p in model.parameters()) == 506_306
    assert [p.shape for p in (model.pos_embed, model.cls_token)] == [(1, 129, 64), (1, 1, 64)]
    shapes = {n[14:]: tuple(p.shape) for n, p in model.named_parameters() if "blocks.0.attn" in n}
    assert shapes == {"qkv.weight": (768, 64), "proj.weight": (64, 256), "proj.bias": (64,)}
    assert [block.residual for block in model.blocks] == [True] * 5 + [False]
    assert tuple(model.config) == tuple(inspect.signature(DiverseViT).parameters)
    assert 0.9 < model.pos_embed.std() < 1.1


def test_autocast_casts_the_images_itself():
    model = build(**SMALL, dtype=torch.float32)
    images = draw_images(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, alone = model(images.bfloat16()), model.head_logits(images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(images), rtol=0, atol=0.05)
    torch.testing.assert_close(alone.float(), model.head_logits(images), rtol=0, atol=0.05)


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_a_published_checkpoint_comes_back(tmp_path, nest):
    model, path = build(dtype=torch.float32), tmp_path / "weights.pth"
    state = to_published_state_dict(model)
    torch.save({nest: state, "epoch": 7} if nest else state, path)
    before = torch.get_rng_state()
    loaded = DiverseViT.from_published_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == model.config
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(loaded(draw_images(model)), model(draw_images(model)))


TO_QKV, BIAS = LAYER + "0.fn.to_qkv.weight", LAYER + "1.fn.net.3.bias"
TOKEN, PLACES = "vit.cls_token", "vit.pos_embedding"
BAD_CHECKPOINTS = {  # what happens to a right state dict, words of the error
    "no positions": (lambda s: {k: s[k] for k in s if k != PLACES}, [PLACES, "without"]),
    "no bias": (lambda s: {k: s[k] for k in s if k != BIAS}, [BIAS, "without"]),
    "no norms": (lambda s: {k: s[k] for k in s if "s.1.0.norm" not in k}, [LAYER + "0.norm.bias"]),
    "no block": (lambda s: {k: s[k] for k in s if LAYER not in k}, [LAYER, "and 8 more"]),
    "extra": (lambda s: s | {"vit.extra": torch.ones(6)}, ["vit.extra", "no other keys"]),
    "qkv bias": (lambda s: s | {TO_QKV[:-6] + "bias": 0}, ["to_qkv.bias", "no other keys"]),
    "shape": (lambda s: s | {TO_QKV: s[TO_QKV][:-3]}, [TO_QKV, "[45, 6]", "[42, 6]"]),
    "axes": (lambda s: s | {PLACES: s[PLACES][0]}, [PLACES, "[25, 6]"]),
    "number": (lambda s: s | {TOKEN: 3.0}, [TOKEN, "float"]),
    "integers": (lambda s: s | {TOKEN: s[TOKEN].long()}, [TOKEN, "torch.int64"]),
    "dtypes": (lambda s: s | {TOKEN: s[TOKEN].half()}, [TOKEN, "torch.float16"]),
    "a tensor": (lambda s: torch.ones(3), ["a state dict", "Tensor"]),
    "empty": (lambda s: {}, ["no keys"]),
    "odd keys": (lambda s: {1: {}, 2: 3}, ["1, 2"]),
    "two nests": (lambda s: {"state_dict": s, "model": s}, ["exactly one", "state_dict, model"]),
    "foreign nest": (lambda s: {"model": {"x": torch.ones(1)}}, [PLACES]),
}


@pytest.mark.parametrize(("change", "words"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_named(model, checkpoint, change, words):
    content = change(published_state(model))
    refused(lambda: checkpoint(content), "weights.pth", *words)


BAD_OPTIONS = [({"heads": n}, f"15, got {n!r}") for n in (4, 0, "3")]
BAD_OPTIONS += [({"size": n}, f"got {n!r}") for n in ((8, 13), (3, 32), 96, (-8, -12), None)]
BAD_OPTIONS += [({"size": (16, 24)}, "patches of 4x4")]


@pytest.mark.parametrize(("option", "word"), BAD_OPTIONS, ids=str)
def test_arguments_that_do_not_fit_the_checkpoint(model, checkpoint, option, word):
    argument = "num_heads: expected" if "heads" in option else "image_size: expected"
    refused(lambda: checkpoint(published_state(model), **option), argument, word)


class LeavesAMark(str):
    """A path that unpickles to a call that creates the file."""

    def __reduce__(self):
        return (open, (str(self), "w"))


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_code_in_a_checkpoint_is_not_run(tmp_path, dump):
    mark, path = tmp_path / "mark", tmp_path / "weights.pth"
    with open(path, "wb") as file:
        dump({"vit.cls_token": LeavesAMark(mark)}, file)
    refused(lambda: DiverseViT.from_published_checkpoint(path), "weights.pth", "of tensors")
    assert not mark.exists()


GARBAGE = [b"", b"not a model", bytes(range(256)) * 8, b"\x80\x02}q\x00", None, "folder", "cut"]


@pytest.mark.parametrize("read", [DiverseViT.load, DiverseViT.from_published_checkpoint])
@pytest.mark.parametrize("content", GARBAGE)
def test_a_damaged_file_is_refused(tmp_path, model, read, content):
    path = tmp_path / "damaged"
    if content == "folder":
        path.mkdir()
    elif content == "cut":
        model.save(path) if read == DiverseViT.load else torch.save(published_state(model), path)
        path.write_bytes(path.read_bytes()[:-100])
    elif content is not None:
        path.write_bytes(content)
    refused(lambda: read(path), "damaged")


def test_what_the_published_format_cannot_say(model):
    refused(lambda: to_published_state_dict(build(**SMALL, last_residual=True)), "last_residual")
    prune_heads(model, {1: [0]})
    refused(lambda: to_published_state_dict(model), "pruned layers [1]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_saved_model_comes_back(tmp_path, dtype):
    model, path = build(**SMALL, last_residual=True, dtype=dtype), tmp_path / "model.safetensors"
    model.save(path)
    before = torch.get_rng_state()
    loaded = DiverseViT.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config == model.config
    path.write_bytes(b"the file may change afterwards")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_pruned_model_comes_back_pruned(tmp_path, model, images):
    prune_heads(model, {0: [1], -1: [0, 2]})
    prune_heads(model, {-1: [1]})
    assert model.kept_heads == {0: (1,), 1: (0, 1, 2), 2: (2,)}
    model.save(tmp_path / "pruned.safetensors")
    loaded = DiverseViT.load(tmp_path / "pruned.safetensors")
    assert loaded.kept_heads == model.kept_heads
    assert loaded.state_dict()["blocks.2.attn.qkv.weight"].shape == (15, 6)
    assert torch.equal(loaded(images), model(images))


def test_a_failed_save_leaves_what_was_there(tmp_path, model, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UsageError, match="got disk full;"):
        model.save(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {path.name: b"before"}
    refused(lambda: model.save(tmp_path / "no" / "model.safetensors"), "folder")
    refused(lambda: model.save(tmp_path), "folder")


@pytest.mark.parametrize(
    ("config", "kept", "word"),
    [
        (None, None, "config"),
        ("{}", None, "kept_heads"),
        ("{", "{}", "JSONDecodeError"),
        ('{"wide": 3}', "{}", "TypeError"),
        ('{"dim": 0}', "{}", "dim: expected"),
        (SMALL, "[]", "AttributeError"),
        (SMALL, '{"0": [9]}', "heads: expected"),
        (SMALL, '{"9": [0]}', "layers: expected"),
        (SMALL, '{"1": [0]}', "blocks.1.attn.qkv.weight of shape [15, 6]"),
        (SMALL | {"mlp_dim": 8}, "{}", "blocks.0.mlp.0.weight of shape [8, 6]"),
        (SMALL | {"depth": 4}, "{}", "blocks.3.norm1.weight"),
        (SMALL | {"depth": 2}, "{}", "blocks.2."),
    ],
)
def test_a_foreign_safetensors_file_is_refused(tmp_path, model, config, kept, word):
    path = tmp_path / "foreign"
    config = json.dumps(config) if isinstance(config, dict) else config
    metadata = {"config": config, "kept_heads": kept}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(model.state_dict(), path, metadata=metadata or None)
    refused(lambda: DiverseViT.load(path), "foreign", word)


BAD_SIZES = [("image_size", size) for size in ((8, 13), 8, (8, 12, 3), (0, 12))]
BAD_SIZES += [("patch_size", 0), ("depth", 0), ("dim", 6.0), ("num_classes", True)]


@pytest.mark.parametrize(("name", "value"), [*BAD_SIZES, ("last_residual", 1)], ids=str)
def test_a_wrong_configuration_is_refused(name, value):
    refused(lambda: DiverseViT(**SMALL | {name: value}), f"{name}: expected", f"got {value!r}")


BAD_IMAGES = {
    "numpy": (lambda x: x.numpy(), ["ndarray"]),
    "one image": (lambda x: x[0], ["[B, 3, 8, 12]", "[3, 8, 12]"]),
    "transposed": (lambda x: x.mT, ["[B, 3, 8, 12]", "[2, 3, 12, 8]"]),
    "gray": (lambda x: x[:, :1], ["[2, 1, 8, 12]"]),
    "bytes": (lambda x: (x * 255).byte(), ["torch.uint8", "/ 255"]),
    "dtype": (lambda x: x.float(), ["torch.float64", "torch.float32"]),
    "device": (lambda x: x.to("meta"), ["device cpu", "meta"]),
}


@pytest.mark.parametrize("method", ["forward", "features", "head_logits"])
@pytest.mark.parametrize(("wrong", "words"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_wrong_images_are_refused(model, images, method, wrong, words):
    refused(lambda: getattr(model, method)(wrong(images)), "images: expected", *words)
