"""The penalty inside training systems (DDP, FSDP, checkpointing, compile): exact, or refused with a hint."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from tests.helpers import ranks
from tests.helpers.vits import assert_same, diverse_vit, gradients, images_for, labels_for, timm_vit

system = pytest.mark.system
"""What a user combines with the penalty, and whether that is right or refused: rows of ``docs/systems.md``."""
vit = ranks.average_vit


def loss_of(model, forward=None, diversity=None, **options):
    diversity = dvf.HeadDiversity(model, **options) if diversity is None else diversity
    images = images_for(model)
    with diversity:
        logits = (model if forward is None else forward)(images)
    return F.cross_entropy(logits, labels_for(images)) + 100 * diversity.penalty(logits)


def by_grad(model, loss):
    return gradients(model, loss)


def by_backward(model, loss, inputs=None):
    model.zero_grad()
    loss.backward(inputs=inputs)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def by_inputs(model, loss):
    return by_backward(model, loss, list(model.parameters()))


WAYS = {"autograd.grad": by_grad, "backward": by_backward, "backward(inputs)": by_inputs}


@pytest.fixture(params=WAYS, ids=str)
def ask(request):
    return WAYS[request.param]


@pytest.fixture(scope="module")
def expect():
    model = vit()
    return by_grad(model, loss_of(model))


def checkpointed(blocks, reentrant):
    for block in blocks:
        block.forward = _checkpointed(block.forward, reentrant)


def _checkpointed(forward, reentrant):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=reentrant, **kwargs)


class TestCheckpointing:
    @system("checkpointing (non-reentrant) of the blocks below the layer", "right")
    def test_below_the_layer(self, ask, expect):
        model = vit()
        checkpointed(model.blocks[:2], reentrant=False)
        assert_same(ask(model, loss_of(model)), expect)

    def test_reentrant_below_the_layer(self, expect):
        """PyTorch itself refuses ``inputs`` there."""
        model = vit()
        checkpointed(model.blocks[:2], reentrant=True)
        model.patch_embed.proj.register_forward_hook(lambda _m, _i, out: out)
        assert_same(by_backward(model, loss_of(model)), expect)

    @system("checkpointing (non-reentrant) around, above and inside the layers", "right")
    def test_around_the_layer(self, ask, expect):
        model = vit()
        checkpointed(model.blocks, reentrant=False)
        assert_same(ask(model, loss_of(model)), expect)

    @system("reentrant checkpointing of the layer, or above it", "refused")
    @pytest.mark.parametrize("blocks", [slice(2, 3), slice(0, 3)], ids=["last", "all"])
    def test_reentrant_around_the_layer_is_refused(self, blocks):
        model = vit()
        checkpointed(model.blocks[blocks], reentrant=True)
        with pytest.raises(UnsupportedError, match="pass use_reentrant=False"):
            loss_of(model)


def compiled_after(name):
    """A model whose part was compiled when the context existed already."""
    model = vit()
    diversity = dvf.HeadDiversity(model)
    (model.get_submodule(name) if name else model).compile(backend="aot_eager")
    return model, model, diversity


def compiled_wrapper():
    model = vit()
    return model, torch.compile(model, backend="aot_eager"), dvf.HeadDiversity(model)


def compiled_function(linear):
    model = vit()
    last = torch.compile((lambda x: 2 * x) if linear else torch.sin, backend="aot_eager")
    return model, lambda images: last(model(images)), dvf.HeadDiversity(model)


COMPILED = {
    "model": lambda: compiled_after(""),
    "block": lambda: compiled_after("blocks.2"),
    "norm": lambda: compiled_after("fc_norm"),
    "wrapper": compiled_wrapper,
    "function": lambda: compiled_function(False),
    "linear function": lambda: compiled_function(True),
}


@system("torch.compile of the model, or of anything at or above the layer", "refused")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_at_or_above_the_layer_is_refused(name):
    """PyTorch would drop the penalty from ``backward(inputs=...)`` if the compiled part is linear."""
    torch._dynamo.reset()
    model, forward, diversity = COMPILED[name]()
    with pytest.raises(UnsupportedError, match="compile only the blocks below"):
        loss_of(model, forward, diversity)


@system("torch.compile of the blocks below the layer", "right")
def test_compiled_below_the_layer(ask, expect):
    torch._dynamo.reset()
    model = vit()
    for block in model.blocks[:2]:
        block.compile(backend="aot_eager")
    assert_same(ask(model, loss_of(model)), expect)


class TestFunctional:
    @system("torch.func.grad, functional_call", "right")
    def test_grad(self, expect):
        model = vit()
        parameters = dict(model.named_parameters())

        def loss(given):
            return loss_of(model, lambda x: torch.func.functional_call(model, given, (x,)))

        found = torch.func.grad(loss)(parameters)
        assert_same([found[name] for name in parameters], expect)

    def test_functional_call(self, expect):
        model = vit()
        given = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        loss = loss_of(model, lambda x: torch.func.functional_call(model, given, (x,)))
        assert_same(list(torch.autograd.grad(loss, list(given.values()))), expect)


class TestThreads:
    @system("a forward on another thread", "refused")
    def test_a_forward_on_another_thread_is_plain_and_the_penalty_says_so(self):
        model = vit()
        plain, out = model(images_for(model)), []

        def forward(images):
            thread = threading.Thread(target=lambda: out.append(model(images)))
            thread.start()
            thread.join()
            return out[0]

        with pytest.raises(UsageError, match="logits computed under this context"):
            loss_of(model, forward)
        torch.testing.assert_close(out[0], plain)

    def test_entered_on_two_threads(self):
        model, failures = vit(), []
        diversity = dvf.HeadDiversity(model)

        def enter():
            try:
                with diversity:
                    pass
            except UsageError as failure:
                failures.append(str(failure))

        with diversity:
            thread = threading.Thread(target=enter)
            thread.start()
            thread.join()
            logits = model(images_for(model))
        assert len(failures) == 1
        assert "enter it once" in failures[0]
        assert diversity.penalty(logits) > 0


class TestContexts:
    @system("two contexts on one model", "right")
    def test_two_of_one_model(self, expect):
        model = vit()
        first, second = dvf.HeadDiversity(model), dvf.HeadDiversity(model)
        images = images_for(model)
        with first, second:
            logits = model(images)
        penalty = (first.penalty(logits) + second.penalty(logits)) / 2
        assert_same(
            by_grad(model, F.cross_entropy(logits, labels_for(images)) + 100 * penalty), expect
        )

    @system("attention maps (`capture_heads(maps=)`)", "right")
    @pytest.mark.parametrize("inside", [False, True])
    def test_maps_beside_the_penalty(self, expect, inside):
        model = vit()
        diversity, heads = dvf.HeadDiversity(model), dvf.capture_heads(model, maps=[2, 0])
        with heads if inside else diversity, diversity if inside else heads:
            logits = model(images_for(model))
        penalty = diversity.penalty(logits)
        loss = F.cross_entropy(logits, labels_for(logits)) + 100 * penalty
        by_map = torch.autograd.grad(logits.sum(), heads.maps[-1], retain_graph=True)
        assert by_map[0].abs().max() > 1e-6
        assert_same(by_grad(model, loss), expect)

    @system("attention dropout, in training mode", "right")
    @pytest.mark.parametrize("around", [False, True], ids=["", "checkpointed"])
    def test_attention_dropout(self, ask, around):
        model = timm_vit(global_pool="avg", class_token=False, attn_drop_rate=0.4).train()
        if around:
            checkpointed(model.blocks, reentrant=False)
        found = []
        for backend in ("auto", "reference"):
            torch.manual_seed(5)
            with dvf.use_backend(backend):
                found.append(ask(model, loss_of(model, layers="all")))
        assert_same(*found)

    def test_an_exception_inside_restores(self, expect):
        model = vit()
        diversity = dvf.HeadDiversity(model)
        with pytest.raises(RuntimeError), diversity:
            model(torch.zeros(1, 7, 16, 16, dtype=torch.float64))
        assert all("_plain_class" not in vars(type(m)) for m in model.modules())
        assert_same(by_grad(model, loss_of(model, diversity=diversity)), expect)

    def test_a_forward_on_the_instance_is_refused(self):
        model = vit()
        attention = model.blocks[-1].attn
        attention.forward = attention.forward
        with pytest.raises(
            UnsupportedError, match=r"blocks.2.attn has a forward put on the instance"
        ):
            loss_of(model)
        assert all("_plain_class" not in vars(type(m)) for m in model.modules())

    def test_moved_inside(self):
        model = vit()
        with dvf.HeadDiversity(model):
            model.float().double()
            model(images_for(model))
        assert all("_plain_class" not in vars(type(m)) for m in model.modules())

    @system("torch.export, deepcopy, pickle, state_dict", "right")
    def test_export_after_use(self):
        model = vit().eval()
        loss_of(model)
        images = images_for(model)
        torch.testing.assert_close(
            torch.export.export(model, (images,)).module()(images), model(images)
        )


class TestModels:
    @system("a layer used in several places", "right")
    def test_a_layer_used_twice_is_the_mean_of_its_runs(self):
        """Heads shared by two places of a model."""
        model = vit()
        model.blocks[1].attn = model.blocks[2].attn
        unshared = vit()
        unshared.blocks[1].attn = copy.deepcopy(unshared.blocks[2].attn)
        penalties = []
        for m, layers in ((model, "last"), (unshared, [1, 2])):
            diversity = dvf.HeadDiversity(m, layers=layers)
            with diversity:
                logits = m(images_for(m))
            penalties.append(diversity.penalty(logits))
        torch.testing.assert_close(*penalties)

    @system("frozen layers", "right")
    @pytest.mark.parametrize("frozen", ["blocks.2.attn.qkv", "blocks.2", "blocks.0"])
    def test_frozen_layers(self, frozen, expect):
        model = vit()
        names = [n for n, _ in model.named_parameters()]
        model.get_submodule(frozen).requires_grad_(False)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        ours = by_grad(model, loss_of(model))
        assert_same(ours, [g for n, g in zip(names, expect, strict=True) if n in trained])

    def test_one_sample(self):
        model = vit()
        images = images_for(model)
        diversity = dvf.HeadDiversity(model)
        each = []
        for part in (images, *images.split(1)):
            with diversity:
                logits = model(part)
            each.append(diversity.penalty(logits))
        torch.testing.assert_close(each[0], torch.stack(each[1:]).mean())

    @system("logits of a part of the batch", "refused")
    def test_a_part_of_the_logits(self):
        model = vit()
        images = images_for(model, batch=4)
        diversity = dvf.HeadDiversity(model)
        with diversity:
            logits = model(images)
        with pytest.raises(UsageError, match=r"logits: expected a row for each of the 4 samples"):
            diversity.penalty(logits[:2])

    @system("several forwards in one block, of any sizes", "right")
    def test_forwards_of_unequal_size(self, ask):
        model = vit()
        images = images_for(model, batch=3)
        diversity = dvf.HeadDiversity(model, layers="all")
        losses = []
        for parts in ((images,), images.split([1, 2])):
            with diversity:
                logits = torch.cat([model(part) for part in parts])
            losses.append(ask(model, logits.sum() + 100 * diversity.penalty(logits)))
        assert_same(losses[1], losses[0])

    def test_no_sample(self):
        model = vit()
        diversity = dvf.HeadDiversity(model)
        with diversity:
            logits = model(images_for(model)[:0])
        penalty = diversity.penalty(logits)
        assert penalty == 0
        assert diversity.cosines == []
        penalty.backward()

    def test_images_of_another_size(self):
        model = timm_vit(dynamic_img_size=True)
        diversity = dvf.HeadDiversity(model)
        for side in (16, 24):
            with diversity:
                logits = model(torch.randn(2, 3, side, side, dtype=torch.float64))
            diversity.penalty(logits).backward()
        tokens = (24 // 8) ** 2 + 1
        assert diversity.cosines[0].shape in [(2, n, 3, 3) for n in (1, tokens)]

    def test_windows_have_no_sample_granularity(self):
        from timm.models.swin_transformer import SwinTransformer

        sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 12}
        model = SwinTransformer(**sizes, depths=(1,), num_heads=(2,), num_classes=5).double()
        with pytest.raises(UnsupportedError, match="granularity"):
            loss_of(model, granularity="sample")


class TestHalf:
    """float16 gradients vanish or overflow without the adapted factor, on which the penalty does not depend."""

    def step(self, dtype, size, **options):
        model = diverse_vit().float()
        diversity = dvf.HeadDiversity(
            model, layers="all", target=lambda logits: logits.max(-1).values * size, **options
        )
        images = images_for(model).float()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            with diversity:
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels_for(images)) + 100 * diversity.penalty(
                logits
            )
        scale = 64.0 if dtype == torch.float16 else 1.0  # GradScaler's part
        grads = gradients(model, loss * scale)
        return loss.detach(), torch.cat([g.flatten() / scale for g in grads])

    @system("autocast, bfloat16 and float16 with GradScaler", "right")
    @pytest.mark.parametrize("size", [1.0, 1e-5, 1e4], ids=["plain", "vanishing", "overflowing"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, dtype, size):
        loss, grads = self.step(dtype, size)
        expect_loss, expect = self.step(torch.float32, 1.0)
        torch.testing.assert_close(loss, expect_loss, rtol=0.02, atol=0)
        limit = 0.03 if dtype == torch.bfloat16 else 0.01
        assert (grads - expect).norm() <= limit * expect.norm()

    def test_without_the_factor_it_is_wrong(self):
        """Gradients vanish without it."""
        _, grads = self.step(torch.float16, 1e-5, grad_scale=1.0)
        _, expect = self.step(torch.float32, 1.0)
        assert not (grads - expect).norm() <= 0.1 * expect.norm()

    @system("float16 that overflows with any factor", "refused")
    def test_overflow_of_a_fixed_factor_is_refused(self):
        with pytest.raises(UnsupportedError, match="float16: the gradients of the heads overflow"):
            self.step(torch.float16, 1e4, grad_scale=2.0**15)

    @pytest.mark.parametrize("factor", [0, -1.0, "auto", float("inf"), True])
    def test_bad_factors(self, factor):
        with pytest.raises(UsageError, match="grad_scale: expected a positive number"):
            dvf.HeadDiversity(vit(), grad_scale=factor)

    def test_any_factor_is_the_same_penalty(self, expect):
        model = vit()
        assert_same(by_grad(model, loss_of(model, grad_scale=1000.0)), expect)


@system("DDP (find_unused_parameters, bucket views, no_sync accumulation)", "right")
def test_ddp():
    ranks.run("ddp", "ddp_accumulation")


@system("a module called past its DDP; DDP, FSDP2: backward of loss, then of penalty", "refused")
def test_ddp_called_past():
    ranks.run("ddp_called_past", "ddp_two_passes", "fsdp2_two_passes")


@system("FSDP2 (fully_shard), with and without resharding after forward; HSDP", "right")
def test_fsdp2():
    ranks.run("fsdp2", "hsdp")


@system("DDP and FSDP2 with checkpointing (non-reentrant) of every block", "right")
def test_checkpointed_on_ranks():
    ranks.run("ddp_checkpointed", "fsdp2_checkpointed")


@system(
    "`second_order` and a gradient by the images under DDP and FSDP2, also checkpointed", "right"
)
def test_gradient_penalty_on_ranks():
    ranks.run("ddp_gradient_penalty", "fsdp2_gradient_penalty")


@system("`compile_loss`, `prune_heads`, `cost` of a model in DDP or FSDP2", "refused")
def test_refused_on_ranks():
    ranks.run("refused_on_ranks")


@system("DDP(static_graph=True), FSDP1, FSDP2 of blocks without a root, DataParallel", "refused")
def test_parallelism_that_is_refused():
    ranks.run("ddp_static_graph", "fsdp2_without_a_root", "fsdp1")
    with pytest.raises(UnsupportedError, match="use DistributedDataParallel"):
        dvf.HeadDiversity(nn.DataParallel(vit()))
