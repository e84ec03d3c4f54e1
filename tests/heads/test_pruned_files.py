"""Pruned models are saved and loaded into fresh ones, files that do not fit are refused, savings reported."""

import copy
import json
import os
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.heads.pruned_files import load_pruned, pruning_report, save_pruned
from tests.helpers import vits
from tests.helpers.vits import images_for, labels_for
from tests.helpers.zoo import ZOO

diverse_vit = partial(vits.diverse_vit, depth=2)
timm_vit = partial(vits.timm_vit, depth=2, num_heads=4, num_classes=3)


@pytest.fixture
def one_rank():
    """A process group of this process."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def tied():
    """Two blocks with one MLP, and two names for one weight."""
    model = timm_vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    model.blocks[1].attn.qkv.bias = model.blocks[0].attn.qkv.bias
    return model


MODELS = {
    "diverse-vit": diverse_vit,
    "timm-qk-norm": partial(timm_vit, qk_norm=True),
    "tied": tied,
}


def other(make):
    """The same architecture with other weights."""
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return model


def unchanged(model):
    """Return a function that raises if the model is no longer what it is now."""
    before = copy.deepcopy(model.state_dict())
    kept = [getattr(m, "kept_heads", None) for m in model.modules()]

    def check():
        assert [getattr(m, "kept_heads", None) for m in model.modules()] == kept
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())

    return check


HEADS = {"one": {-1: [2]}, "two-layers": {0: [0, 3], 1: [1, 2, 0]}, "none": None}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_round_trip(make, heads, tmp_path):
    """After pruning and training, loading gives the file's weights, with H / kept applied once."""
    path = tmp_path / "model.safetensors"
    model = other(make)
    if heads is not None:
        dvf.prune_heads(model, heads)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        images = images_for(model)
        F.cross_entropy(model(images), labels_for(images)).backward()
        optimizer.step()
    check = unchanged(model)
    save_pruned(model, path)
    check()
    fresh = make().train()
    assert load_pruned(fresh, path) is fresh
    assert torch.equal(fresh(images_for(model)), model(images_for(model)))
    ours, theirs = fresh.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for a, b in zip(fresh.modules(), model.modules(), strict=True):
        assert getattr(a, "kept_heads", None) == getattr(b, "kept_heads", None)
    assert all(p.requires_grad and p.is_leaf for p in fresh.parameters())
    assert os.listdir(tmp_path) == [path.name]


def test_transformers(tmp_path):
    """transformers' own ``from_pretrained`` refuses a pruned checkpoint."""
    entry = ZOO["HF ViT"]
    torch.manual_seed(0)
    model, fresh = entry.make().eval(), entry.make().eval()
    images = torch.randn(2, 3, entry.side, entry.side)
    save_pruned(dvf.prune_heads(model, {0: [1], 1: [0, 2]}), tmp_path / "hf.safetensors")
    load_pruned(fresh, tmp_path / "hf.safetensors")
    assert torch.equal(fresh(images).logits, model(images).logits)


def test_distributed_data_parallel(one_rank, tmp_path):
    """Saved and loaded as the model inside."""
    path = tmp_path / "model.safetensors"
    model = dvf.prune_heads(other(timm_vit), {1: [2]})
    save_pruned(nn.parallel.DistributedDataParallel(model), path)
    fresh = timm_vit()
    load_pruned(nn.parallel.DistributedDataParallel(fresh), path)
    assert torch.equal(fresh(images_for(model)), model(images_for(model)))


def test_into_a_model_pruned_alike(tmp_path):
    path = tmp_path / "model.safetensors"
    model = dvf.prune_heads(other(timm_vit), {0: [0, 2, 3]})
    dvf.prune_heads(model, {0: [1, 2], 1: [3]})
    save_pruned(model, path)
    alike = dvf.prune_heads(timm_vit(), {0: [2, 3]})
    weight = alike.blocks[0].attn.qkv.weight
    load_pruned(alike, path)
    assert alike.blocks[0].attn.qkv.weight is weight
    assert [b.attn.kept_heads for b in alike.blocks] == [(2, 3), (3,)]
    assert torch.equal(alike(images_for(alike)), model(images_for(alike)))


def test_metadata_says_how_many_heads_there_were(tmp_path):
    """Also of a layer pruned twice."""
    path = tmp_path / "model.safetensors"
    model = dvf.prune_heads(timm_vit(), {1: [2, 0]})
    save_pruned(dvf.prune_heads(model, {1: [1]}), path)
    with safetensors.safe_open(path, framework="pt") as file:
        (layer,) = json.loads(file.metadata()["pruned_layers"])
    assert (layer["heads"], layer["kept"]) == (4, [2])


def test_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    model = dvf.prune_heads(timm_vit(), {1: [2, 0]})
    save_pruned(model, path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["diversevit_fast"] == dvf.__version__
    assert json.loads(metadata["pruned_layers"]) == [
        {"layer": 1, "name": "blocks.1.attn", "heads": 4, "kept": [0, 2]}
    ]


def test_shared_tensors_as_safetensors_does(tmp_path):
    """One copy of each; ``load_model`` reads it, and what ``save_model`` wrote is read."""
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    model = dvf.prune_heads(other(tied), {1: [0]})
    save_pruned(model, ours)
    with safetensors.safe_open(ours, framework="pt") as file:
        metadata, stored = file.metadata(), set(file.keys())
    assert len(stored) == len(set(map(id, model.parameters())))
    assert metadata["blocks.1.mlp.fc1.weight"] == "blocks.0.mlp.fc1.weight"
    alike = dvf.prune_heads(tied(), {1: [0]})
    safetensors.torch.load_model(alike, ours)
    safetensors.torch.save_model(
        model, theirs, {"pruned_layers": metadata["pruned_layers"], "diversevit_fast": "0"}
    )
    for loaded in (alike, load_pruned(tied(), theirs)):
        assert torch.equal(loaded(images_for(model)), model(images_for(model)))
        assert loaded.blocks[1].mlp.fc1.weight is loaded.blocks[0].mlp.fc1.weight


def rewritten(path, change):
    """The file with its metadata and tensors changed."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    del metadata["checksum"]
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def layers_are(*entries):
    def change(metadata, tensors):
        metadata["pruned_layers"] = json.dumps(entries)

    return change


def entry(**changes):
    return {"layer": 1, "name": "blocks.1.attn", "heads": None, "kept": [2]} | changes


def shared_twice(metadata, tensors):
    tensors["blocks.1.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"] + 1


REFUSED = {
    "deeper": ({"depth": 3}, None, "the tensors blocks.2."),
    "shallower": ({"depth": 1}, None, "layer 1 named 'no such layer', got 'blocks.1.attn'"),
    "wider": ({"embed_dim": 32}, None, "cls_token of shape [1, 1, 32]"),
    "fewer heads": (
        {"num_heads": 2},
        None,
        "heads of the model's 2 in blocks.1.attn, got heads [2]",
    ),
    "another norm": ({"qk_norm": True}, None, "the tensors blocks.0.attn.q_norm.weight"),
    "no bias": ({"qkv_bias": False}, None, "no other tensors, got blocks.0.attn.qkv.bias"),
    "diverse-vit": (None, None, "the tensors"),
    "missing": ({}, lambda m, t: t.pop("norm.bias"), "the tensors norm.bias, got a file without"),
    "extra": ({}, lambda m, t: t.update(a=t["norm.bias"] + 1), "no other tensors, got a;"),
    "dtype": (
        {},
        lambda m, t: t.update({"norm.bias": t["norm.bias"].float()}),
        "norm.bias of shape [24] and torch.float64, the model's, got [24] and torch.float32",
    ),
    "no metadata": ({}, lambda m, t: m.clear(), "metadata 'pruned_layers', got a file without"),
    "not json": (
        {},
        lambda m, t: m.update(pruned_layers="{"),
        "metadata 'pruned_layers', got some",
    ),
    "not layers": ({}, layers_are({"a": 1}), "metadata 'pruned_layers', got something"),
    "a number": ({}, layers_are(3), "metadata 'pruned_layers', got something"),
    "no number": ({}, layers_are(entry(layer=None)), "metadata 'pruned_layers', got something"),
    "another name": ({}, layers_are(entry(name="x")), "layer 1 named 'blocks.1.attn', got 'x'"),
    "negative": ({}, layers_are(entry(layer=-1)), "layer -1 named 'no such layer'"),
    "other count": (
        {},
        layers_are(entry(heads=5)),
        "heads of the model's 4 in blocks.1.attn, got heads [2] of 5",
    ),
    "other kept": ({}, layers_are(entry(kept=[1, 2])), "blocks.1.attn.qkv.weight of shape"),
    "nothing kept": ({}, layers_are(entry(kept=[])), "heads of the model's 4 in blocks.1.attn"),
    "booleans kept": (
        {},
        layers_are(entry(kept=[False, True])),
        "heads of the model's 4 in blocks.1.attn",
    ),
    "a boolean count": ({}, layers_are(entry(heads=True)), "heads of the model's 4"),
    "a boolean layer": ({}, layers_are(entry(layer=True)), "metadata 'pruned_layers', got some"),
    "half a layer": ({}, layers_are(entry(layer=1.5)), "metadata 'pruned_layers', got something"),
    "kept twice": ({}, layers_are(entry(kept=[2, 2])), "heads of the model's 4 in blocks.1.attn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, tmp_path):
    """In one line, and the model stays as it was."""
    options, change, message = REFUSED[name]
    path = tmp_path / "model.safetensors"
    save_pruned(dvf.prune_heads(timm_vit(), {1: [2]}), path)
    if change is not None:
        rewritten(path, change)
    model = diverse_vit() if options is None else timm_vit(**options)
    check = unchanged(model)
    with pytest.raises(UsageError) as failure:
        load_pruned(model, path)
    assert str(failure.value).startswith(f"path '{path}': expected {message}"), failure.value
    assert "\n" not in str(failure.value)
    check()


PRUNED = {
    "otherwise": {1: [1]},
    "more": {1: [2], 0: [0]},
    "other layer": {0: [2]},
}


@pytest.mark.parametrize("heads", PRUNED.values(), ids=PRUNED.keys())
def test_a_model_pruned_otherwise_is_refused(heads, tmp_path):
    path = tmp_path / "model.safetensors"
    save_pruned(dvf.prune_heads(timm_vit(), {1: [2]}), path)
    model = dvf.prune_heads(timm_vit(), heads)
    check = unchanged(model)
    with pytest.raises(UsageError, match=r"as the model is pruned already, got .*fresh model$"):
        load_pruned(model, path)
    check()


def test_one_tensor_for_two_names_and_two_in_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_pruned(tied(), path)
    rewritten(path, shared_twice)
    with pytest.raises(UsageError, match=r"expected one tensor for blocks.0.mlp.fc1.weight and"):
        load_pruned(tied(), path)


def test_two_names_in_the_model_and_one_in_the_file(tmp_path):
    save_pruned(tied(), tmp_path / "model.safetensors")
    with pytest.raises(
        UsageError, match=r"expected the tensors blocks.1.attn.qkv.bias, .* and 2 more"
    ):
        load_pruned(timm_vit(), tmp_path / "model.safetensors")


def test_files_that_are_none(tmp_path):
    model = timm_vit()
    check = unchanged(model)
    (tmp_path / "text").write_text("no tensors")
    for path, message in (
        (tmp_path / "nothing", "expected a file, got nothing there"),
        (tmp_path, "expected a file, got a folder"),
        (tmp_path / "text", "expected an intact safetensors file"),
    ):
        with pytest.raises(UsageError, match=message):
            load_pruned(model, path)
    for path in (tmp_path, tmp_path / "no" / "model.safetensors"):
        with pytest.raises(UsageError, match="expected a file name in an existing folder"):
            save_pruned(model, path)
    check()


def test_the_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("before")

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(UsageError, match=r"a place that can be written, got no space;"):
            save_pruned(timm_vit(), path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == [path.name]
    save_pruned(timm_vit(), path)
    load_pruned(timm_vit(), path)


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        raise AssertionError("never read")


def overlapping(model):
    whole = torch.zeros(40, dtype=torch.float64)
    model.register_buffer("a", whole[:30])
    model.register_buffer("b", whole[10:])


def sparse(model):
    model.register_buffer("a", torch.eye(3).to_sparse())


def stateful(model):
    model.head = WithState(24, 3)


@pytest.mark.parametrize("change", [overlapping, sparse, stateful])
def test_state_that_is_no_tensor_of_its_own_is_refused(change, tmp_path):
    model = timm_vit()
    change(model)
    with pytest.raises(UnsupportedError, match=r"^model: ") as failure:
        save_pruned(model, tmp_path / "model.safetensors")
    assert "\n" not in str(failure.value)
    assert os.listdir(tmp_path) == []


def test_layers_that_cannot_be_pruned(tmp_path):
    """The file is right; the model given has a norm across heads."""
    path = tmp_path / "model.safetensors"
    save_pruned(dvf.prune_heads(timm_vit(), {1: [2]}), path)
    model = timm_vit(scale_attn_norm=True)
    check = unchanged(model)
    with pytest.raises(UnsupportedError, match="keep_heads"):
        load_pruned(model, path)
    check()


class OlderSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = 3, 8
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        each = (f(x) for f in (self.query, self.key, self.value))
        q, k, v = (y.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for y in each)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


OlderSelfAttention.__module__, OlderSelfAttention.__qualname__ = "transformers.old", "ViTAttention"


class OlderAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = OlderSelfAttention()
        self.output = nn.Module()
        self.output.dense = nn.Linear(24, 24)

    def forward(self, x):
        return self.output.dense(self.attention(x))


class TestReport:
    @pytest.mark.parametrize("make", [timm_vit, diverse_vit], ids=["timm", "diverse-vit"])
    def test_counts(self, make):
        model = make().train()
        images = images_for(model)
        check = unchanged(model)
        report = pruning_report(model, {-1: [1], 0: [0, 2, 3]}, images)
        check()
        assert model.training
        assert "kept_heads" not in vars(model.blocks[0].attn)
        pruned = dvf.prune_heads(copy.deepcopy(model), {-1: [1], 0: [0, 2, 3]})
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
        assert report.model.parameters == tuple(sizes)
        assert [layer.name for layer in report.layers] == ["blocks.0.attn", "blocks.1.attn"]
        B, N, D = (3, 9, 16) if isinstance(model, dvf.models.DiverseViT) else (3, 5, 24)
        d = model.blocks[0].attn.head_dim
        for layer, kept in zip(report.layers, (3, 1), strict=True):
            flops = [2 * B * h * (N * D * 4 * d + 2 * N * N * d) for h in (4, kept)]
            assert layer.flops == tuple(flops)
        saved = sum(a - b for a, b in (layer.flops for layer in report.layers))
        assert report.model.flops[0] - report.model.flops[1] == saved
        saved = sum(a - b for a, b in (layer.parameters for layer in report.layers))
        assert report.model.parameters[0] - report.model.parameters[1] == saved

    def test_whole_model_without_attention(self):
        """FLOPs are those of PyTorch's counter plus the attention it does not know on a CPU."""
        model = timm_vit()
        report = pruning_report(model, {0: [0]}, images_for(model))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images_for(model))
        attention = 2 * 2 * 2 * 3 * 4 * 5 * 5 * 6  # products, add and multiply, layers, B H N N d
        assert report.model.flops[0] == counter.get_total_flops() + attention

    def test_output_projection_outside_of_the_module(self):
        """transformers' older layout: it belongs to the layer all the same."""
        torch.manual_seed(0)
        model = nn.Sequential(OlderAttention().double())
        x = torch.randn(2, 5, 24, dtype=torch.float64)
        report = pruning_report(model, {0: [0]}, x)
        assert report.layers[0].parameters == (4 * 24 * 25, 4 * 8 * 24 + 3 * 8 + 24)
        assert report.layers[0].flops == report.model.flops
        products = 2 * 2 * (4 * 5 * 24 * 24 + 2 * 3 * 5 * 5 * 8)
        assert report.model.flops == (products, products // 3)

    def test_fast_paths_are_counted(self):
        """Of PyTorch's own encoder layer, which in eval mode is one operator."""
        torch.manual_seed(0)
        encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(encoder, dvf.nn.MultiHeadAttention(8, 2)).train()
        modes = []
        model.register_forward_pre_hook(lambda m, _: modes.append(m.training))
        report = pruning_report(model, {1: [0]}, torch.randn(3, 5, 8))
        attention = 15 * 4 * 8 * 8 + 2 * 3 * 5 * 5 * 8
        whole = 2 * (attention + 15 * 2 * 8 * 16) + 2 * attention
        assert report.model.flops == (whole, whole - attention)
        assert modes == [False, False]

    def test_text(self):
        model = timm_vit()
        text = str(pruning_report(model, {-1: [1]}, images_for(model)))
        lines = text.splitlines()
        assert len(lines) == 3
        assert lines[1].startswith("VisionTransformer")
        assert lines[2].split()[:4] == ["blocks.1.attn", "2,400", "->", "618"]

    def test_heads_that_do_not_exist(self):
        model = timm_vit()
        check = unchanged(model)
        with pytest.raises(UsageError, match="heads: expected a list of different heads"):
            pruning_report(model, {0: [4]}, images_for(model))
        check()
