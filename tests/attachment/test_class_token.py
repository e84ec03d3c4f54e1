"""The last block computed for the class token alone: exact, and only where it is safe."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import diversevit_fast as dvf
from diversevit_fast.attachment import attachment, class_token, packed_projection, replacements
from diversevit_fast.attachment.class_token import register_class_token_model
from diversevit_fast.integrations.timm import Attention
from diversevit_fast.models import Block, DiverseViT
from tests.helpers.vits import (
    Calls,
    assert_same,
    diverse_vit,
    gradients,
    images_for,
    step,
    timm_vit,
)


def query_rows(monkeypatch, model, inputs=None):
    """Rows that each attention call of a regularised forward returns, at and above the chosen layer."""
    seen = []
    rows = {
        "attention": lambda heads: heads.shape[-2],
        "attention_qkvpacked": lambda heads: heads.shape[1],
        "vit_end": lambda logits: 1,
    }

    def spied(name, original):
        def spy(*args, **options):
            result = original(*args, **options)
            seen.append(rows[name](result))
            return result

        return spy

    with monkeypatch.context() as patch:
        for module in (attachment, replacements, packed_projection, class_token):
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


def with_norms(model):
    """timm's model with norms of queries and keys, which its attention module runs itself."""
    attn = model.blocks[-1].attn
    attn.q_norm, attn.k_norm = (nn.LayerNorm(attn.head_dim).double() for _ in range(2))
    return model


class Tokens(nn.Module):
    """An MLP that insists on tokens."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        B, N, D = x.shape
        return self.mlp(x.reshape(B * N, D)).view(B, N, D)


def with_tokens(model):
    model.blocks[-1].mlp = Tokens(model.blocks[-1].mlp)
    return model


@pytest.mark.parametrize("wrt", ["input", "output"])
@pytest.mark.parametrize(
    "make",
    [
        diverse_vit,
        timm_vit,
        lambda: timm_vit(attn_layer=Attention),
        lambda: timm_vit(init_values=0.5),
        lambda: with_norms(timm_vit()),
        lambda: with_tokens(timm_vit()),
    ],
    ids=["diverse_vit", "timm", "ours in timm", "layer scale", "norms", "tokens"],
)
def test_same_numbers_as_without_it(monkeypatch, make, wrt):
    model = make()

    def numbers():
        logits, penalty = step(model, dvf.HeadDiversity(model, wrt=wrt), images_for(model))
        return logits, penalty, gradients(model, logits.sum() + 100 * penalty)

    logits, penalty, grads = numbers()
    assert query_rows(monkeypatch, model) == [1]
    monkeypatch.setattr(class_token, "_models", {})
    expect, expect_penalty, expect_grads = numbers()
    assert query_rows(monkeypatch, model) != [1]
    torch.testing.assert_close(logits, expect)
    torch.testing.assert_close(penalty, expect_penalty)
    assert_same(grads, expect_grads)


def runs_by_hand(monkeypatch, model):
    """How often a regularised forward runs a layer by operators, without watching its calls."""
    original, seen = attachment.Attachment.run_by_hand, []
    with monkeypatch.context() as patch:
        patch.setattr(
            attachment.Attachment,
            "run_by_hand",
            lambda *a, **k: seen.append(1) or original(*a, **k),
        )
        step(model, dvf.HeadDiversity(model), images_for(model))
    return len(seen)


def test_known_blocks_run_by_operators(monkeypatch):
    for model in (
        diverse_vit(),
        diverse_vit(last_residual=True),
        timm_vit(),
        timm_vit(init_values=0.5, drop_path_rate=0.1, proj_drop_rate=0.1),
        timm_vit(attn_layer=Attention),
    ):
        assert runs_by_hand(monkeypatch, model) == 1


def own_forward(model, monkeypatch):
    """As ``accelerate`` and wrappers of checkpointing leave it."""
    mlp = model.blocks[-1].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x)


def patched_class(model, monkeypatch):
    cls = type(model.blocks[-1].attn)
    original = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *a, **k: original(self, *a, **k))


def another_activation(model, monkeypatch):
    model.blocks[-1].mlp.act = nn.SiLU()


def another_linear(model, monkeypatch):
    class LoRA(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model.blocks[-1].mlp.fc1.__class__ = LoRA


def compiled(model, monkeypatch):
    model.blocks[-1].mlp.fc1._compiled_call_impl = model.blocks[-1].mlp.fc1._call_impl


CHANGES = [own_forward, patched_class, another_activation, another_linear, compiled]


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_with_something_unknown_do_not(monkeypatch, change):
    model = timm_vit()
    diversity = dvf.HeadDiversity(model)  # not compiled yet
    change(model, monkeypatch)
    monkeypatch.setattr(
        attachment.Attachment, "run_by_hand", lambda *_, **__: pytest.fail("by hand")
    )
    logits, _ = step(model, diversity, images_for(model))
    torch.testing.assert_close(logits, model(images_for(model)))


def test_whoever_watches_calls_inside_sees_the_model_s_own():
    model = timm_vit()
    diversity, calls = dvf.HeadDiversity(model), Calls()
    with diversity, calls:
        model(images_for(model))
    assert len(calls.stock) == 3
    with calls, diversity:  # below, it sees what runs in their place
        model(images_for(model))
    assert (len(calls.stock), len(calls.ours)) == (5, 1)


def test_calls_are_watched_again_after_the_block():
    model = timm_vit()
    model.norm = Watched(model.norm)
    with dvf.HeadDiversity(model):
        logits = model(images_for(model))
    assert "layer_norm" in type(model.norm.seen.grad_fn).__name__
    assert logits.shape == (3, 5)


class Watched(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        self.seen = self.norm(x)
        return self.seen


@pytest.mark.parametrize("wrt", ["input", "output"])
def test_a_penalty_of_one_module_is_the_same(wrt):
    """``dvf.nn.HeadPenalty`` reads what the module's last forward left, be it of one token."""
    model, penalty = diverse_vit(), dvf.nn.HeadPenalty(wrt=wrt)
    images, attn = images_for(model), model.blocks[-1].attn
    expect = penalty(model(images).max(-1).values, attn)
    with dvf.HeadDiversity(model):
        logits = model(images)
    torch.testing.assert_close(penalty(logits.max(-1).values, attn), expect)


@pytest.mark.parametrize("first", [True, False])
def test_not_taken_where_another_context_sees_the_layer(first):
    """It would be shown head outputs of the class token alone."""
    model = timm_vit()
    images, diversity = images_for(model), dvf.HeadDiversity(model)
    with dvf.capture_heads(model, layers="last") as heads:
        model(images)
    (expect,) = heads
    heads = dvf.capture_heads(model, layers="last")
    outer, inner = (heads, diversity) if first else (diversity, heads)
    with outer, inner:
        model(images)
    torch.testing.assert_close(heads[0], expect)


def test_not_taken_past_a_block_s_forward_that_was_replaced(monkeypatch):
    model = timm_vit()
    original, seen = type(model.blocks[0]).forward, []
    monkeypatch.setattr(
        type(model.blocks[0]), "forward", lambda *a, **k: seen.append(1) or original(*a, **k)
    )
    assert query_rows(monkeypatch, model) == [5]
    assert len(seen) == 3


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
