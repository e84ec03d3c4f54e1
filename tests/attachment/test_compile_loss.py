"""A compiled loss has the eager loss's value and every parameter's gradient, or it is an error."""

import copy
import functools
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from tests.attachment.test_zoo import made
from tests.helpers.versions import compiles_losses
from tests.helpers.vits import (
    VITS,
    assert_same,
    diverse_vit,
    gradients,
    images_for,
    labels_for,
    timm_vit,
)
from tests.helpers.zoo import ZOO

compiled_loss = functools.partial(dvf.compile_loss, backend="aot_eager")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def loss_of(diversity, read=lambda output: output):
    def loss(model, images, labels):
        with diversity:
            logits = read(model(images))
        return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)

    return loss


def check(model, fn, images=None, **tolerance):
    """The compiled loss twice, against the same function run eagerly."""
    images = images_for(model, 4) if images is None else images
    labels, compiled = labels_for(images), compiled_loss(fn)
    expect = fn(model, images, labels)
    expect_grads = gradients(model, expect)
    for _ in range(2):
        loss = compiled(model, images, labels)
        torch.testing.assert_close(loss, expect)
        loss.backward()
        ours = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        assert_same(ours, expect_grads)
        model.zero_grad()


OPTIONS = [
    {},
    {"layers": "all"},
    {"layers": [0, 1], "wrt": "output"},
    {"layers": [0, 1], "granularity": "sample", "reduction": "pairs", "target": "probability"},
]


LIBRARIES = ("HF ViT", "torchvision ViT", "open_clip ViT", "timm EVA-02", "timm SigLIP")


@compiles_losses
class TestRight:
    @pytest.mark.parametrize("name", LIBRARIES)
    def test_other_libraries(self, name):
        """Separate projections, torch's own multi-head attention, RoPE, attention pooling."""
        _, model, images, _ = made(name)
        read, diversity = ZOO[name].logits, dvf.HeadDiversity(model)
        check(model, loss_of(diversity, read), images)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("vit", VITS.values(), ids=VITS.keys())
    def test_value_and_gradients(self, vit, options):
        model = vit()
        diversity = dvf.HeadDiversity(model, **options)
        check(model, loss_of(diversity))
        assert diversity.cosines[-1].shape[-2:] == (diversity.num_heads[-1],) * 2

    def test_the_penalty_is_there(self):
        """The comparison can fail: without the penalty the gradients are far away."""
        model = diverse_vit()
        images = images_for(model, 4)
        labels = labels_for(images)
        with_penalty = compiled_loss(loss_of(dvf.HeadDiversity(model)))(model, images, labels)
        plain = F.cross_entropy(model(images), labels)
        assert with_penalty > plain + 1
        with pytest.raises(AssertionError):
            assert_same(gradients(model, with_penalty), gradients(model, plain))

    @pytest.mark.slow
    @pytest.mark.parametrize("vit", [diverse_vit, timm_vit])
    def test_the_default_backend(self, vit, monkeypatch):
        monkeypatch.setenv("CI", "true")  # Inductor is stricter there
        model = vit().float()
        images = images_for(model, 4).float()
        labels = labels_for(images)
        fn = loss_of(dvf.HeadDiversity(model, layers="all"))
        ours, expect = dvf.compile_loss(fn)(model, images, labels), fn(model, images, labels)
        torch.testing.assert_close(ours, expect, rtol=1e-4, atol=1e-4)
        for a, b in zip(gradients(model, ours), gradients(model, expect), strict=True):
            assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-5

    def test_a_training(self):
        """The same steps, over batches of several sizes; one compilation a size, or one in all."""
        models = [diverse_vit(depth=1) for _ in range(3)]
        images, labels = images_for(models[0]), labels_for(images_for(models[0]))
        losses = [loss_of(dvf.HeadDiversity(model)) for model in models]
        losses[1:] = compiled_loss(losses[1]), compiled_loss(losses[2], dynamic=True)
        optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in models]
        for n in (4, 3, 4, 2):
            for model, loss, optimizer in zip(models, losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss(model, images[:n], labels[:n]).backward()
                optimizer.step()
        for model in models[1:]:
            assert_same(list(model.parameters()), list(models[0].parameters()))

    @pytest.mark.parametrize(("dynamic", "count"), [(False, 3), (None, 2)])
    def test_recompiles_only_for_another_shape(self, dynamic, count):
        model = diverse_vit()
        images, labels = images_for(model, 4), labels_for(images_for(model, 4))
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        fn = loss_of(dvf.HeadDiversity(model))
        loss = dvf.compile_loss(fn, backend=backend, dynamic=dynamic)
        for n in (4, 4, 3, 3, 2, 4):
            loss(model, images[:n], labels[:n])
        assert len(graphs) == count
        assert not torch._dynamo.config.trace_autograd_ops

    def test_eager_use_in_between_is_undisturbed(self):
        model = diverse_vit()
        images, labels = images_for(model, 4), labels_for(images_for(model, 4))
        classes = [type(m) for m in model.modules()]
        diversity = dvf.HeadDiversity(model, layers="all")
        fn = loss_of(diversity)
        expect = fn(model, images, labels)
        loss = compiled_loss(fn)
        for _ in range(2):
            torch.testing.assert_close(loss(model, images, labels), expect)
            assert [type(m) for m in model.modules()] == classes
            assert (diversity._recording.runs, diversity._running) == ([], None)
            assert torch.equal(fn(model, images, labels), expect)

    def test_heads_kept_inside(self):
        model = diverse_vit()
        diversity, kept = dvf.HeadDiversity(model), dvf.keep_heads(model, {-1: [0, 2]})

        def fn(model, images, labels):
            with kept, diversity:
                logits = model(images)
            return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)

        check(model, fn)

    def test_a_penalty_of_one_s_own(self):
        model = diverse_vit()

        def fn(model, images, labels):
            x, block = model.features(images), model.blocks[-1]
            y, heads = block.attn(block.norm1(x), return_heads=True)
            logits = model.head(model.norm(block.after_attention(x[:, 0], y[:, 0])))
            score = logits.max(-1).values.sum()
            (grads,) = torch.autograd.grad(score, heads, create_graph=True)
            return F.cross_entropy(logits, labels) + 100 * dvf.head_penalty(grads)

        check(model, fn)

    def test_a_tuple_with_the_loss(self):
        model = diverse_vit()
        images, labels = images_for(model, 4), labels_for(images_for(model, 4))
        diversity = dvf.HeadDiversity(model)

        @compiled_loss
        def loss(model, images, *, labels):
            with diversity:
                logits = model(images)
            penalty = diversity.penalty(logits)
            return F.cross_entropy(logits, labels) + 100 * penalty, logits.detach(), penalty

        total, logits, penalty = loss(model, images, labels=labels)
        expect = loss_of(diversity)(model, images, labels)
        torch.testing.assert_close(total, expect)
        torch.testing.assert_close(logits, model(images))
        torch.testing.assert_close(penalty, (expect - F.cross_entropy(logits, labels)) / 100)
        assert_same(gradients(model, total), gradients(model, expect))
        assert loss.__name__ == "loss"

    def test_checkpointing_and_freezing_below_the_layer(self):
        model = diverse_vit()
        plain = model.blocks[0].forward
        model.blocks[0].forward = lambda x: checkpoint(plain, x, use_reentrant=False)
        model.blocks[1].requires_grad_(False)
        check_trainable(model, loss_of(dvf.HeadDiversity(model)))

    def test_autocast(self):
        model = diverse_vit().float()
        images = images_for(model, 4).float()
        labels = labels_for(images)
        fn = loss_of(dvf.HeadDiversity(model, layers="all"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, expect = compiled_loss(fn)(model, images, labels), fn(model, images, labels)
        torch.testing.assert_close(ours, expect, rtol=2e-2, atol=0)
        for a, b in zip(gradients(model, ours), gradients(model, expect), strict=True):
            assert (a - b).norm() <= 0.05 * b.norm() + 1e-6


def check_trainable(model, fn):
    images, labels = images_for(model, 4), labels_for(images_for(model, 4))
    parameters = [p for p in model.parameters() if p.requires_grad]
    expect = torch.autograd.grad(fn(model, images, labels), parameters)
    ours = torch.autograd.grad(compiled_loss(fn)(model, images, labels), parameters)
    assert_same(list(ours), list(expect))


def refused(kind, match, fn, *args):
    with pytest.raises(kind, match=match) as failure:
        fn(*args)
    assert "\n" not in str(failure.value)


def batch_for(model):
    images = images_for(model, 4)
    return model, images, labels_for(images)


@compiles_losses
class TestRefused:
    @pytest.mark.parametrize("options", [{"every": 2}, {"fraction": 0.5}], ids=str)
    def test_amortised_penalties(self, options):
        model = diverse_vit()
        loss = compiled_loss(loss_of(dvf.HeadDiversity(model, **options)))
        for _ in range(2):
            refused(UnsupportedError, r"^every, fraction: not available", loss, *batch_for(model))

    def test_a_context_entered_outside(self):
        model = diverse_vit()
        diversity = dvf.HeadDiversity(model)

        def fn(model, images, labels):
            logits = model(images)
            return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits)

        loss = compiled_loss(fn)
        with diversity:
            refused(
                UnsupportedError, r"called inside `with HeadDiversity`", loss, *batch_for(model)
            )
        refused(UsageError, "logits computed under this context", loss, *batch_for(model))

    def test_head_penalty_module(self):
        """Refused: it reads the module's last eager run, which does not exist inside a graph."""
        model = diverse_vit()
        penalty = dvf.nn.HeadPenalty()

        def fn(model, images, labels):
            logits = model(images)
            score = logits.max(-1).values
            return F.cross_entropy(logits, labels) + penalty(score, model.blocks[-1].attn)

        loss = compiled_loss(fn)
        refused(UnsupportedError, "HeadPenalty: reads", loss, *batch_for(model))
        alive = model(images_for(model, 4))
        refused(UnsupportedError, "HeadPenalty: reads", loss, *batch_for(model))
        assert alive.requires_grad

    def test_a_frozen_model_up_to_the_layer(self):
        model = diverse_vit().requires_grad_(False)
        model.head.requires_grad_(True)
        loss = compiled_loss(loss_of(dvf.HeadDiversity(model)))
        refused(UnsupportedError, r"cannot be one graph.*requires_grad_", loss, *batch_for(model))

    def test_a_checkpointed_layer(self):
        model = timm_vit(global_pool="avg").train()
        model.set_grad_checkpointing()
        loss = compiled_loss(loss_of(dvf.HeadDiversity(model)))
        refused(UsageError, "logits that do not depend on blocks.2.attn", loss, *batch_for(model))

    def test_no_gradients_and_another_model(self):
        model = diverse_vit()
        loss = compiled_loss(loss_of(dvf.HeadDiversity(model)))
        with torch.no_grad():
            refused(UsageError, "logits: expected a tensor with a graph", loss, *batch_for(model))
        clone = copy.deepcopy(model)
        refused(UsageError, "logits computed under this context", loss, *batch_for(clone))

    def test_python_the_graph_cannot_hold(self):
        model = diverse_vit()

        def fn(model, images, labels):
            print("step")
            return F.cross_entropy(model(images), labels)

        loss = compiled_loss(fn)
        match = r"^compile_loss: cannot be one graph \(at .*test_compile_loss.py:\d+\).*print"
        refused(UnsupportedError, match, loss, *batch_for(model))

    @pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
    @pytest.mark.filterwarnings("ignore:.*Error detected in:UserWarning")
    @pytest.mark.filterwarnings("ignore:.*Previous calculation was induced:UserWarning")
    def test_stock_attention_differentiated_twice(self, backend):
        model = timm_vit()

        def fn(model, images, labels):
            logits, weight = model(images), model.blocks[0].attn.qkv.weight
            (grad,) = torch.autograd.grad(logits.sum(), weight, create_graph=True)
            return F.cross_entropy(logits, labels) + grad.square().sum()

        match = (
            f"backend='{backend}' raised: RuntimeError: derivative for aten::_scaled_dot_product"
        )
        loss = dvf.compile_loss(fn, backend=backend)
        refused(UnsupportedError, rf"{match}.* use dvf\.attention$", loss, *batch_for(model))

    FAILURES = {
        "lines": (ValueError("first\nsecond"), "ValueError: first$"),
        "blank": (RuntimeError("\n  \n  said"), "RuntimeError: said$"),
        "silent": (AssertionError(), "AssertionError: no message$"),
    }

    @pytest.mark.parametrize("name", FAILURES)
    def test_what_a_backend_says(self, name):
        error, match = self.FAILURES[name]

        def backend(graph, inputs):
            raise error

        def fn(model, images, labels):
            return F.cross_entropy(model(images), labels)

        loss = dvf.compile_loss(fn, backend=backend)
        match = f"^compile_loss: cannot be one graph: backend='backend' raised: +{match}"
        refused(UnsupportedError, match, loss, *batch_for(diverse_vit()))

    RAISED = {
        "of one's own": (ValueError, "mine\ntwo 'lines'", r"it raises ValueError\(.mine"),
        "silent": (ArithmeticError, "", r"it raises ArithmeticError\(''\)$"),
        "not ours": (RuntimeError, "raised exception UsageError('x')", "it raises RuntimeError"),
    }

    @pytest.mark.parametrize("name", RAISED)
    def test_what_the_function_raises(self, name):
        error, said, match = self.RAISED[name]

        def fn(model, images, labels):
            raise error(said)

        match = rf"^compile_loss: cannot be one graph \(at .*\): {match}"
        refused(UnsupportedError, match, compiled_loss(fn), *batch_for(diverse_vit()))

    def test_too_many_shapes(self):
        model = diverse_vit()
        _, images, labels = batch_for(model)
        loss = compiled_loss(loss_of(dvf.HeadDiversity(model)), dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=1):
            loss(model, images, labels)
            match = "compiled too often for other shapes"
            refused(UnsupportedError, match, loss, model, images[:3], labels[:3])


class TestRefusedByEveryVersion:
    @pytest.mark.parametrize("vit", [diverse_vit, timm_vit])
    def test_torch_compile_of_the_loss_without_the_switch(self, vit):
        """Our context inside ``torch.compile`` itself raises before a penalty could be dropped."""
        model = vit()
        loss = torch.compile(loss_of(dvf.HeadDiversity(model)), backend="aot_eager")
        with pytest.raises(UnsupportedError, match=r"use dvf\.compile_loss"):
            loss(*batch_for(model))

    @pytest.mark.parametrize("vit", [diverse_vit, timm_vit])
    def test_one_graph_without_the_switch(self, vit):
        """Before 2.14 the compiler itself refuses the context."""
        model, old = vit(), torch.__version__ < (2, 14)
        loss = loss_of(dvf.HeadDiversity(model))
        said = "how to enter a `HeadDiversity` context" if old else r"use dvf\.compile_loss"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=said):
            torch.compile(loss, backend="aot_eager", fullgraph=True)(*batch_for(model))

    @pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cu130"])
    def test_an_older_pytorch(self, version, monkeypatch):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        match = f"^compile_loss: needs PyTorch 2.14, .* this is {re.escape(version)}$"
        refused(UnsupportedError, match, dvf.compile_loss, max)

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda: dvf.compile_loss(nn.Linear(1, 1)), "fn: expected a function"),
            (lambda: dvf.compile_loss(3), "fn: expected a function"),
            (lambda: dvf.compile_loss(max, fullgraph=False), "fullgraph: expected nothing"),
        ],
        ids=["a model", "a number", "fullgraph"],
    )
    def test_bad_arguments(self, call, said):
        refused(UsageError, f"^{said}", call)


@compiles_losses
def test_code_kept_on_disk_is_that_of_these_operators(tmp_path, monkeypatch):
    """Inductor's cache on disk knows operators by name only, not by version."""
    tags = []

    def backend(graph, _):
        tags.append(torch.compiler.config.cache_key_tag)
        return graph

    def compiled_once():
        torch._dynamo.reset()
        with torch.compiler.config.patch(cache_key_tag="mine"):
            dvf.compile_loss(lambda x: x.sum(), backend=backend)(torch.ones(2))
            assert torch.compiler.config.cache_key_tag == "mine"

    compiled_once()
    compiled_once()
    (tmp_path / "changed.py").write_text("other = 1\n")
    monkeypatch.setattr(dvf.ops, "__file__", str(tmp_path / "__init__.py"))
    loss_module = sys.modules[dvf.compile_loss.__module__]
    loss_module._operators.cache_clear()
    compiled_once()
    loss_module._operators.cache_clear()
    assert all(tag.startswith("mine") for tag in tags)
    assert tags[0] == tags[1] != tags[2]
