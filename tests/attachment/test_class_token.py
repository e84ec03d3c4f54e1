"""The last block computed for the class token alone: exact, and only where it is safe."""

import subprocess
import sys

import torch
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.attachment import class_token, packed_projection, second_order
from diversevit_fast.attachment.class_token import register_class_token_model
from diversevit_fast.models import Block, DiverseViT
from tests.helpers.vits import assert_same, diverse_vit, gradients, images_for, step, timm_vit


def query_rows(monkeypatch, model, inputs=None):
    """Rows of each attention call of a regularised forward, at and above the chosen layer."""
    seen = []
    rows = {"attention": -2, "attention_qkvpacked": 1}

    def spied(name, original):
        return lambda x, *a, **k: seen.append(x.shape[rows[name]]) or original(x, *a, **k)

    with monkeypatch.context() as patch:
        for module in (second_order, packed_projection):
            for name in rows.keys() & vars(module).keys():
                patch.setattr(module, name, spied(name, getattr(module, name)))
        step(model, dvf.HeadDiversity(model), images_for(model) if inputs is None else inputs)
    return seen


def test_taken_where_only_the_class_token_is_read(monkeypatch):
    for model in (diverse_vit(), timm_vit()):
        assert query_rows(monkeypatch, model) == [1]


def test_not_taken_for_average_pooling_hooks_or_features(monkeypatch):
    model = timm_vit(global_pool="avg")
    assert query_rows(monkeypatch, model) == [5]
    model = timm_vit()
    model.blocks[-1].mlp.register_forward_hook(lambda *_: None)
    assert query_rows(monkeypatch, model) == [5]


def test_dense_features_inside_the_context_are_complete():
    model = timm_vit()
    images = images_for(model)
    expect = model.forward_features(images)
    diversity = dvf.HeadDiversity(model)
    with diversity:
        features = model.forward_features(images)
        logits = model.forward_head(features)
    torch.testing.assert_close(features, expect)
    _, penalty = step(model, dvf.HeadDiversity(model), images)
    torch.testing.assert_close(diversity.penalty(logits), penalty)


class Subclass(DiverseViT):
    """Not registered: its forward may be another."""


class Foreign(nn.Module):
    """A model of somebody's own that pools by its class token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(16, 2, 8, 24), Block(16, 2, 8, 24))
        self.norm = dvf.nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(self.blocks(x)[:, 0])


def test_only_registered_classes_take_it(monkeypatch):
    model = Subclass(image_size=(16, 8), dim=16, depth=2, num_heads=2, head_dim=8, mlp_dim=24)
    assert query_rows(monkeypatch, model.double()) == [9]


def test_a_model_can_be_registered(monkeypatch):
    """Same numbers as before, from one query."""
    model, tokens = Foreign().double(), torch.randn(3, 5, 16, dtype=torch.float64)
    expect, penalty = step(model, dvf.HeadDiversity(model), tokens)
    expect_gradients = gradients(model, expect.sum() + 100 * penalty)
    only_token = lambda block, x: Block.forward(block, x, class_token_only=True)  # noqa: E731
    monkeypatch.setattr(class_token, "_models", {**class_token._models})
    register_class_token_model(Foreign, Block, only_token)
    assert query_rows(monkeypatch, model, tokens) == [1]
    logits, ours = step(model, dvf.HeadDiversity(model), tokens)
    torch.testing.assert_close(logits, expect)
    torch.testing.assert_close(ours, penalty)
    assert_same(gradients(model, logits.sum() + 100 * ours), expect_gradients)


def test_timm_is_registered_without_being_imported():
    code = (
        "import sys, torch, diversevit_fast as dvf; "
        "dvf.HeadDiversity(dvf.models.DiverseViT(depth=1)); "
        "assert not any(name.partition('.')[0] == 'timm' for name in sys.modules); "
        "import timm; model = timm.create_model('vit_tiny_patch16_224', depth=1); "
        "dvf.HeadDiversity(model); "
        "from diversevit_fast.attachment.class_token import class_token_block; "
        "assert class_token_block(model, model.blocks[-1].attn) is model.blocks[-1]"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
