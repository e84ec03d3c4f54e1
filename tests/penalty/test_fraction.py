"""``fraction``: second order for some samples, on average the penalty and gradient of all."""

import importlib
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from tests.helpers.published import published_penalty
from tests.helpers.vits import (
    VITS,
    Calls,
    assert_same,
    attentions,
    diverse_vit,
    full,
    gradients,
    images_for,
    labels_for,
    step,
    timm_vit,
)

backends = importlib.import_module("diversevit_fast.ops.backends")
attention_ops = importlib.import_module("diversevit_fast.ops.attention")
packed_ops = importlib.import_module("diversevit_fast.ops.attention_qkvpacked")
gelu_ops = importlib.import_module("diversevit_fast.ops.gelu")


@pytest.fixture(params=VITS.values(), ids=VITS.keys())
def model(request):
    return request.param()


def draw(monkeypatch, chosen, batch=4):
    """Let the next permutations put ``chosen`` first, the rest in a scrambled order."""
    rest = [i for i in reversed(range(batch)) if i not in chosen]
    order = torch.tensor([*chosen, *rest])
    monkeypatch.setattr(torch, "randperm", lambda n, **_: order)


def watched_kernels(note):
    """``backends.kernels``, of whose functions ``note`` is told the name and first tensor of every call."""

    class Watched:
        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            function = getattr(self.module, name)

            def run(first, *args, **options):
                note(name, first if isinstance(first, torch.Tensor) else first[0])
                return function(first, *args, **options)

            return run

    return lambda protocol, x: Watched(backends.kernels(protocol, x))


OPTIONS = [
    {"layers": "last"},
    {"layers": "last", "wrt": "output"},
    {"layers": "all"},
    {"layers": "all", "wrt": "output", "granularity": "sample"},
    {"layers": [0, -2]},
]


class TestFraction:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_the_mean_over_all_draws_is_the_full_penalty(self, model, options, monkeypatch):
        """Every subset of 2 of 4, each as likely: value and every parameter's gradient."""
        images = images_for(model, 4)
        expect = full(model, images, **options)
        diversity = dvf.HeadDiversity(model, fraction=0.5, **options)
        values, grads = [], []
        for chosen in combinations(range(4), 2):
            draw(monkeypatch, chosen)
            _, penalty = step(model, diversity, images)
            values.append(penalty)
            grads.append(gradients(model, penalty))
        assert max(values) - min(values) > 1e-3 * max(values)  # the draws differ
        torch.testing.assert_close(torch.stack(values).mean(), expect, rtol=1e-10, atol=0)
        mean = [torch.stack(g).mean(0) for g in zip(*grads, strict=True)]
        assert_same(mean, gradients(model, expect))

    @pytest.mark.parametrize("wrt", ["input", "output"])
    def test_is_the_published_penalty_of_the_drawn_samples(self, model, wrt, monkeypatch):
        images = images_for(model, 4)
        expect_logits = model(images)
        chosen = [3, 1]
        draw(monkeypatch, chosen)
        diversity = dvf.HeadDiversity(model, fraction=0.5, wrt=wrt)
        logits, penalty = step(model, diversity, images)
        torch.testing.assert_close(logits, expect_logits, rtol=1e-10, atol=1e-10)
        _, expect = published_penalty(model, images[chosen], attentions(model)[-1], wrt)
        torch.testing.assert_close(penalty, expect, rtol=1e-9, atol=1e-12)
        labels = labels_for(images)
        ours = gradients(model, F.cross_entropy(logits, labels) + 100 * penalty)
        theirs = gradients(model, F.cross_entropy(expect_logits, labels) + 100 * expect)
        assert_same(ours, theirs)
        assert diversity.samples.tolist() == chosen
        assert len(diversity.cosines[0]) == 2
        full_one = dvf.HeadDiversity(model, wrt=wrt)
        step(model, full_one, images)
        torch.testing.assert_close(diversity.cosines[0], full_one.cosines[0][chosen])
        assert full_one.samples is None

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_second_order_runs_on_the_drawn_samples_only(self, model, options, monkeypatch):
        batches = {"forward": [], "backward": [], "double_backward": []}

        def note(name, x):
            if name.endswith("ward"):
                batches[name.removeprefix("attention_")].append(len(x))

        for ops in (attention_ops, packed_ops):
            monkeypatch.setattr(ops, "kernels", watched_kernels(note))
        _, penalty = step(
            model, dvf.HeadDiversity(model, fraction=0.25, **options), images_for(model, 4)
        )
        assert set(batches["backward"]) <= {1}
        for seen in batches.values():
            seen.clear()
        gradients(model, penalty)
        assert set(batches["double_backward"]) <= {1}
        # a last layer's own outputs are linear in nothing below: wrt="output" has no double backward
        assert bool(batches["double_backward"]) == (options != OPTIONS[1])

    def test_the_rest_runs_the_model_s_own_attention(self):
        model = timm_vit()
        with Calls() as calls, dvf.HeadDiversity(model, layers=[1, 2], fraction=0.25):
            model(images_for(model, 4))
        assert (calls.stock, calls.ours) == ([4, 3, 3], [1, 1])

    def test_the_class_token_shortcut_stays(self, monkeypatch):
        seen = {"attention": [], "gelu": []}

        def note(name, x):
            if name.endswith("_forward"):
                rows = x.shape[-2] if x.ndim > 2 else 1  # [B, D] is the class token's
                seen[name.removesuffix("_forward")].append((len(x), rows))

        for ops in (attention_ops, packed_ops, gelu_ops):
            monkeypatch.setattr(ops, "kernels", watched_kernels(note))
        for model, expect in (
            (diverse_vit(depth=2), [(4, 9), (1, 1), (3, 1)]),
            (timm_vit(depth=2), [(1, 1)]),  # its own below the last block and on the rest
        ):
            with dvf.HeadDiversity(model, fraction=0.25):
                model(images_for(model, 4))
            assert seen == {"attention": expect, "gelu": expect}
            seen["attention"], seen["gelu"] = [], []

    def test_manual_seed_and_generator_repeat_the_draw(self):
        model = diverse_vit()
        images = images_for(model, 16)
        diversity = dvf.HeadDiversity(model, fraction=0.5)

        def draws(generator=None):
            one = dvf.HeadDiversity(model, fraction=0.5, generator=generator)
            return [(step(model, one, images), one.samples.tolist())[1] for _ in range(3)]

        torch.manual_seed(7)
        first = draws()
        torch.manual_seed(7)
        assert draws() == first
        assert first[0] != first[1] != first[2]
        state = torch.get_rng_state()
        own = draws(torch.Generator().manual_seed(7))
        assert torch.equal(torch.get_rng_state(), state)
        assert own == draws(torch.Generator().manual_seed(7)) == first
        assert diversity.samples is None

    def test_every_sample_is_as_likely(self):
        model = diverse_vit(depth=1)
        images = images_for(model, 4)
        diversity = dvf.HeadDiversity(
            model, fraction=0.5, generator=torch.Generator().manual_seed(0)
        )
        seen = torch.zeros(4)
        for _ in range(200):
            step(model, diversity, images)
            seen[diversity.samples] += 1
        assert seen.sum() == 400
        assert ((seen - 100).abs() < 4 * 50**0.5).all()  # four standard deviations

    @pytest.mark.parametrize(
        ("batch", "fraction", "count"),
        [(1, 0.01, 1), (5, 0.01, 1), (5, 0.5, 2), (5, 0.7, 4), (3, 0.9, 3), (4, 1, 4)],
    )
    def test_how_many(self, batch, fraction, count):
        model = diverse_vit()
        diversity = dvf.HeadDiversity(model, fraction=fraction)
        images = images_for(model, batch)
        _, penalty = step(model, diversity, images)
        assert len(diversity.cosines[0]) == count
        assert (diversity.samples is None) == (count == batch)
        if count == batch:
            torch.testing.assert_close(penalty, full(model, images))

    def test_together_with_every(self, monkeypatch):
        model = diverse_vit()
        images = images_for(model, 4)
        diversity = dvf.HeadDiversity(model, every=2, fraction=0.5)
        draw(monkeypatch, [0, 2])
        values = [step(model, diversity, images)[1] for _ in range(4)]
        torch.testing.assert_close(values[0], 2 * full(model, images[[0, 2]]))
        assert [bool(v > 0) for v in values] == [True, False, True, False]

    def test_batches_of_several_sizes_and_forwards_in_one_block(self, monkeypatch):
        model = diverse_vit()
        images = images_for(model, 4)
        monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).flip(0))
        diversity = dvf.HeadDiversity(model, fraction=0.5)
        with diversity:
            model(images[:2])
            logits = model(images)
        torch.testing.assert_close(diversity.penalty(logits), full(model, images[[3, 2]]))

    def test_a_draw_without_gradients_does_not_happen(self, monkeypatch):
        model = diverse_vit()
        monkeypatch.setattr(torch, "randperm", None)
        with dvf.HeadDiversity(model, fraction=0.5), torch.no_grad():
            torch.testing.assert_close(
                model(images_for(model, 4)), diverse_vit()(images_for(model, 4))
            )

    def test_autocast(self, monkeypatch):
        model = diverse_vit().float()
        images = images_for(model, 4).float()
        draw(monkeypatch, [0, 2])
        exact = full(model, images[[0, 2]], layers="all")
        diversity = dvf.HeadDiversity(model, fraction=0.5, layers="all")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, penalty = step(model, diversity, images)
        (logits.float().sum() + penalty).backward()
        torch.testing.assert_close(penalty, exact, rtol=0.1, atol=1e-3)

    def test_training_lowers_the_penalty(self):
        model = diverse_vit().float()
        images = images_for(model, 16).float()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(0)
        diversity = dvf.HeadDiversity(
            model, layers="all", every=2, fraction=0.5, generator=generator
        )
        before = full(model, images, layers="all").item()
        for _ in range(40):
            logits, penalty = step(model, diversity, images)
            optimizer.zero_grad()
            (F.cross_entropy(logits, labels_for(images)) + 100 * penalty).backward()
            optimizer.step()
        assert full(model, images, layers="all").item() < 0.5 * before


class TestFractionStaysExact:
    """The split gives the same numbers whatever the model does between its blocks."""

    def check(self, model, monkeypatch, images=None, around=None, **options):
        images = images_for(model, 4) if images is None else images
        draw(monkeypatch, [2, 0])
        diversity = dvf.HeadDiversity(model, fraction=0.5, layers="all", **options)
        logits, penalty = step(model, diversity, images)
        expect = full(model, images[[2, 0]], layers="all", **options)
        torch.testing.assert_close(logits, model(images))
        torch.testing.assert_close(penalty, expect, rtol=1e-9, atol=0)
        assert_same(gradients(model, penalty), gradients(model, expect))

    def test_a_hook_costs_the_rest_its_stock_attention(self):
        model = timm_vit()
        model.blocks[1].register_forward_hook(lambda _, args, out: out * 1.5)
        diversity = dvf.HeadDiversity(model, layers="all", fraction=0.25)
        for _ in range(2):  # and a new block forgets it
            with Calls() as calls, diversity:
                model(images_for(model, 4))
            assert (calls.stock, calls.ours) == ([3, 3], [1, 1, 1, 3])

    def test_hooks_that_change_a_block_s_output(self, monkeypatch):
        model = timm_vit()
        model.blocks[0].register_forward_hook(lambda _, args, out: out * 1.5)
        self.check(model, monkeypatch)

    def test_hooks_that_write_into_a_block_s_output(self, monkeypatch):
        model = timm_vit()
        model.blocks[0].register_forward_hook(lambda _, args, out: out.mul_(1.5))
        self.check(model, monkeypatch)

    def test_frozen_trunk(self, monkeypatch):
        model = diverse_vit()
        images = images_for(model, 4)
        draw(monkeypatch, [2, 0])
        expect = gradients(model, full(model, images[[2, 0]]))
        for p in model.parameters():
            p.requires_grad_(False)
        model.head.requires_grad_()
        _, penalty = step(model, dvf.HeadDiversity(model, fraction=0.5), images)
        (ours,) = torch.autograd.grad(penalty, model.head.weight)
        index = [n for n, _ in model.named_parameters()].index("head.weight")
        torch.testing.assert_close(ours, expect[index])

    def test_kept_heads(self, monkeypatch):
        model = diverse_vit()
        images = images_for(model, 4)
        draw(monkeypatch, [2, 0])
        diversity = dvf.HeadDiversity(model, fraction=0.5)
        with dvf.keep_heads(model, {-1: [0, 2]}):
            logits, penalty = step(model, diversity, images)
            expect = full(model, images[[2, 0]])
            torch.testing.assert_close(logits, model(images))
        torch.testing.assert_close(penalty, expect)

    def test_attention_held_by_the_model_itself(self, monkeypatch):
        self.check(Flat().double(), monkeypatch, torch.randn(4, 5, 8, dtype=torch.float64))

    def test_after_an_exception(self, monkeypatch):
        model = diverse_vit()
        diversity = dvf.HeadDiversity(model, fraction=0.5)
        mlp = model.blocks[-1].mlp
        calls = []

        def fail_on_the_rest(*_):
            calls.append(1)
            if len(calls) == 2:
                raise KeyError

        handle = mlp.register_forward_pre_hook(fail_on_the_rest)
        with pytest.raises(KeyError), diversity:
            model(images_for(model, 4))
        handle.remove()
        draw(monkeypatch, [2, 0])
        images = images_for(model, 4)
        torch.testing.assert_close(step(model, diversity, images)[1], full(model, images[[2, 0]]))


class Flat(nn.Module):
    """An attention layer without a block of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.attn = dvf.nn.LayerNorm(8), dvf.nn.MultiHeadAttention(8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head((x + self.attn(self.norm(x))).mean(1).sin())


class Mixing(Flat):
    """Calls a block in the ways that the split cannot follow."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.block = {"batch norm": Normed, "mask": Masked, "tuple": Wrapped}.get(how, Flat)()
        del self.attn
        if how == "instance":
            self.block.forward = lambda x: Flat.forward(self.block, x)

    def forward(self, x):
        if self.how == "keyword":
            return self.block(x=x)
        if self.how == "mask":
            return self.block(x, torch.ones(len(x)))
        if self.how == "folded":
            return self.block(torch.cat([x, x]))[: len(x)]
        out = self.block(x)
        return out[0] if self.how == "tuple" else out


class Normed(Flat):
    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(8)


class Masked(Flat):
    def forward(self, x, mask):
        return super().forward(x * mask[:, None, None])


class Wrapped(Flat):
    def forward(self, x):
        return (super().forward(x),)


class TestFractionRefuses:
    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("batch norm", "Normed holds a BatchNorm"),
            ("keyword", "Flat is not called with one tensor"),
            ("mask", "Masked is not called with one tensor"),
            ("tuple", "Wrapped does not return one tensor"),
            ("instance", r"block\.attn does not run inside its block's own forward"),
            ("folded", "fraction: expected 1 for a model whose blocks see another batch"),
        ],
    )
    def test_blocks_it_cannot_split(self, how, said):
        with pytest.raises((UnsupportedError, UsageError), match=said) as failure:
            self.run(Mixing(how))
        assert "\n" not in str(failure.value)

    def run(self, model):
        step(model, dvf.HeadDiversity(model, fraction=0.5), torch.randn(4, 5, 8))

    @pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan"), True, "1", None], ids=repr)
    def test_bad_fractions_are_one_line(self, fraction):
        with pytest.raises(UsageError, match=r"^fraction: expected a number above 0 and at most 1"):
            dvf.HeadDiversity(diverse_vit(), fraction=fraction)

    def test_a_generator_that_is_none(self):
        with pytest.raises(UsageError, match=r"^generator: expected a torch\.Generator, got int"):
            dvf.HeadDiversity(diverse_vit(), fraction=0.5, generator=3)

    def test_logits_of_another_forward(self):
        model = diverse_vit()
        diversity = dvf.HeadDiversity(model, fraction=0.5)
        stale = model(images_for(model, 4))
        with diversity:
            model(images_for(model, 4))
        with pytest.raises(UsageError, match="logits computed under this context"):
            diversity.penalty(stale)
