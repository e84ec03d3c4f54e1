"""The prefix cache gives the outputs of ``keep_heads`` for many choices of heads with less work."""

import copy
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import diversevit_fast as dvf
from diversevit_fast.attachment.attention_modules import choose_layers
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.heads.prefix_cache import PrefixCache
from tests.helpers.vits import diverse_vit, images_for, timm_vit


def parallel(name):
    from timm.models import vision_transformer

    return lambda: timm_vit(block_fn=getattr(vision_transformer, name), depth=2)


MODELS = {
    "diverse-vit": diverse_vit,
    "timm": timm_vit,
    "timm-qk-norm": lambda: timm_vit(qk_norm=True, global_pool="avg", class_token=False),
    "timm-parallel-scaling": parallel("ParallelScalingBlock"),
    "timm-parallel-things": parallel("ParallelThingsBlock"),
}


def cached_outputs(model, choices, *inputs, layers="all"):
    with PrefixCache(model, choose_layers(model, layers)) as cache:
        return list(cache.outputs(choices, *inputs))


def assert_as_keep_heads(model, choices, *inputs, layers="all"):
    """The outputs equal ``keep_heads``' to the last bit and differ; model and inputs are unchanged."""
    state = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    fresh = [x.clone() for x in inputs]
    ours = cached_outputs(model, choices, *inputs, layers=layers)
    assert [type(m) for m in model.modules()] == classes
    for choice, output in zip(choices, ours, strict=True):
        assert not output.requires_grad
        with torch.no_grad(), dvf.keep_heads(model, choice):
            assert torch.equal(output, model(*(x.clone() for x in fresh))), choice
    assert any(not torch.equal(ours[0], other) for other in ours[1:])
    assert all(torch.equal(x, y) for x, y in zip(inputs, fresh, strict=True))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


CHOICES = {
    "last": lambda n: [{n - 1: [h]} for h in range(3)],
    "first": lambda n: [{0: heads} for heads in ([2], [0, 1], [0, 1, 2], [1])],
    "last-differs": lambda n: [{0: [1], n - 1: [h]} for h in range(3)],
    "all-differ": lambda n: [{i: [(h + i) % 3] for i in range(n)} for h in range(3)],
    "a-layer-named-once": lambda n: [{n - 1: [1]}, {0: [0], n - 1: [1]}, {n - 1: [1, 2]}],
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_equals_keep_heads(make, choices):
    model = make().eval()
    layers = len(choose_layers(model, "all"))
    assert_as_keep_heads(model, choices(layers), images_for(model))


class Linears(TorchFunctionMode):
    """Counts the calls of ``F.linear`` with each weight of a model."""

    def __init__(self, model):
        super().__init__()
        self.names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.counts[self.names[id(args[1])]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("layer", "after"), [(-1, 4), (1, 8), (0, 12)])
def test_runs_only_what_follows(layer, after):
    """Of timm's linear layers only proj, fc1, fc2, the later blocks and the head run again."""
    model = timm_vit().eval()
    index = layer % 3
    with Linears(model) as linears:
        cached_outputs(model, [{index: [h % 3]} for h in range(5)], images_for(model))
    assert linears.counts.total() == 13 + 4 * after


def test_saves_the_products_before():
    model = timm_vit().eval()
    images = images_for(model)
    choices = [{2: heads} for heads in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2])]
    with FlopCounterMode(display=False) as ours:
        cached_outputs(model, choices, images, layers="last")
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model(images)
    tokens, dim = 3 * 5, 24
    tail = 2 * (tokens * (dim * dim + 2 * 4 * dim * dim) + 3 * dim * 5)
    assert ours.get_total_flops() == whole.get_total_flops() + 6 * tail


class Toy(nn.Module):
    """Tokens [B, 4, 8] in, two attention layers; what is between them is ``self.between``."""

    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 8)
        self.between = between
        self.first = dvf.nn.MultiHeadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.second = dvf.nn.MultiHeadAttention(8, 2)
        self.mlp = nn.Linear(8, 8)
        self.double()
        self.eval()

    def forward(self, x):
        return self.second(self.norm(self.first(self.embed(x)))).sum(1)


def tokens():
    return torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


SECOND = [{1: [0]}, {1: [1]}, {1: [0, 1]}, {1: [0]}]


class Shared(Toy):
    """Modules that run twice before the heads and again, on other inputs, after."""

    def forward(self, x):
        x = self.norm(self.embed(self.embed(x)))
        x = x + self.first(self.norm(x))
        x = self.second(self.norm(x))
        return self.mlp(self.norm(self.embed(self.first(x)))).sum(1)


class SharedAttention(Toy):
    """One attention module in three places."""

    def forward(self, x):
        for _ in range(3):
            x = x + self.second(self.norm(x))
        return x.sum(1)


class WrittenAtOnce(Toy):
    def forward(self, x):
        x = self.embed(x)
        x += 1
        y = self.first(x)
        y.mul_(2)
        return self.second(y + x).sum(1)


class WrittenAfterwards(Toy):
    """The end of the model writes into what was made before the heads, and through a view."""

    def forward(self, x):
        skip, other = self.embed(x), self.norm(x)
        y = self.second(skip + other)
        skip += y
        other[:, 0].add_(y[:, 0])
        return self.mlp(skip * other).sum(1)


class WritesToItsInput(Toy):
    def forward(self, x):
        x = self.embed(x)
        before = x.mean(1)
        y = self.between(x)  # ReLU(inplace=True): x is changed as well
        return self.second(y).sum(1) + x.mean(1) + before


class Named(nn.Module):
    def forward(self, x, *, scale, history):
        history.append(x * scale)
        return {"twice": 2 * x, "pair": (x, [x + 1]), "none": None, "text": "a"}


class Containers(Toy):
    """Keyword arguments, nested outputs, and a list that is filled on the way and emptied after."""

    def forward(self, x):
        history = []
        made = self.between(self.embed(x), scale=3.0, history=history)
        made["pair"][1].append(made.pop("twice"))
        made = sum(made["pair"][1]), history.pop()
        assert not history
        return (self.second(made[0] + made[1]) + made[0]).sum(1)


class Replaces(nn.Module):
    """Puts another tensor where its input was."""

    def forward(self, state):
        state["x"] = 2 * state["x"]
        return state["x"] + 1


class Replaced(Toy):
    def forward(self, x):
        state = {"x": self.embed(x)}
        y = self.between(state)
        return (self.second(y) + state["x"]).sum(1)


@dataclass
class Box:
    tensor: torch.Tensor


class Boxes(nn.Module):
    """Returns an object, or fills the one passed to it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, box=None):
        if box is None:
            return Box(self.inner(x))
        box.tensor = self.inner(x) + box.tensor
        return 2 * x


class Unknown(Toy):
    """Takes and returns objects whose contents are unknown."""

    def forward(self, x):
        box = self.between(self.embed(x))
        box.tensor = box.tensor + 1
        filled = Box(x)
        y = self.between(box.tensor, filled)
        return (self.second(y) + filled.tensor * box.tensor).sum(1)


class Calls(nn.Module):
    """Holds another module without being its parent."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.called = []

    def forward(self, x):
        return self.called[0](self.inner(x))


class WritesToHeads(dvf.nn.MultiHeadAttention):
    """Writes to the head outputs in place."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = dvf.attention(q, k, v)
        heads.mul_(2)
        return self.proj(heads.transpose(1, 2).flatten(2))


class InPlaceHeads(Toy):
    def __init__(self):
        super().__init__()
        self.second = WritesToHeads(8, 2).double()


class Elsewhere(Toy):
    """The attention runs inside a module that is not above it in the tree."""

    def forward(self, x):
        self.between.called = [self.second]
        return self.mlp(self.between(self.norm(x))).sum(1)


TOYS = {
    "plain": Toy,
    "shared": Shared,
    "shared-attention": SharedAttention,
    "written-at-once": WrittenAtOnce,
    "written-afterwards": WrittenAfterwards,
    "writes-to-its-input": lambda: WritesToItsInput(nn.ReLU(inplace=True)),
    "containers": lambda: Containers(Named()),
    "replaced": lambda: Replaced(Replaces()),
    "heads-in-place": InPlaceHeads,
    "unknown-objects": lambda: Unknown(Boxes()),
    "elsewhere": lambda: Elsewhere(Calls()),
}


@pytest.mark.parametrize("make", TOYS.values(), ids=TOYS.keys())
def test_awkward_models(make):
    assert_as_keep_heads(make(), SECOND, tokens(), layers="last")


def test_heads_not_named():
    """A layer that a choice does not name keeps all its heads."""
    model = InPlaceHeads()
    ours = cached_outputs(model, [{}, {1: [0]}, {}], tokens())
    with torch.no_grad():
        whole = model(tokens())
    assert torch.equal(ours[0], whole)
    assert torch.equal(ours[2], whole)
    assert not torch.equal(ours[1], whole)


@pytest.mark.parametrize("make", [Toy, Shared, WrittenAtOnce])
def test_several_layers(make):
    choices = [{0: [0], 1: [1]}, {0: [1], 1: [1]}, {0: [0], 1: [0, 1]}]
    assert_as_keep_heads(make(), choices, tokens())


def test_what_cannot_be_kept_runs_and_what_is_inside_does_not():
    """Modules whose output is written to are found one per forward: the attention, then its projection."""
    model = WrittenAtOnce()
    choices = [{1: [h % 2]} for h in range(8)]
    always = {"embed": 8, "first.proj": 8, "second.proj": 8}
    with PrefixCache(model, choose_layers(model, "last")) as cache:
        with Linears(model) as linears:
            list(cache.outputs(choices, tokens()))
        assert linears.counts == {**always, "first.qkv": 3, "second.qkv": 3}
        with Linears(model) as linears:  # what cannot be kept is known by now
            list(cache.outputs(choices, tokens()))
        assert linears.counts == {**always, "first.qkv": 1, "second.qkv": 1}


def test_hooks_see_every_forward():
    """Hooks run also inside modules that would be cached, and may change results."""
    model = timm_vit().eval()
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, i, out: seen.append(out) or out * 2)
    model.blocks[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    choices = [{2: [h]} for h in range(3)]
    assert_as_keep_heads(model, choices, images_for(model))
    assert len(seen) == 2 * len(choices)
    assert all(torch.equal(seen[0], out) for out in seen)


def test_unfused_attention_stays_unfused():
    model = timm_vit().eval()
    model.blocks[0].attn.fused_attn = False
    model.blocks[0].mlp.fc2.register_forward_hook(lambda *_: None)  # so that block 0 runs again
    assert_as_keep_heads(model, [{2: [h]} for h in range(3)], images_for(model), layers="last")


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_blocks_below(in_place):
    model = timm_vit().eval()
    if in_place:
        model.blocks[0].compile(backend="eager")
    else:
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    assert_as_keep_heads(model, [{2: [h]} for h in range(3)], images_for(model), layers="last")


def test_inside_inference_mode():
    model = diverse_vit().eval()
    with torch.inference_mode():
        images = images_for(model)
        ours = cached_outputs(model, [{2: [0]}, {2: [1]}], images)
        with dvf.keep_heads(model, {2: [1]}):
            assert torch.equal(ours[1], model(images))
        model = WrittenAfterwards()
        ours = cached_outputs(model, SECOND, tokens())
        for choice, output in zip(SECOND, ours, strict=True):
            with dvf.keep_heads(model, choice):
                assert torch.equal(output, model(tokens()))


def test_batches_do_not_mix():
    model = diverse_vit().eval()
    images = images_for(model, 6)
    choices = [{2: [0]}, {2: [3]}]
    with PrefixCache(model, choose_layers(model, "last")) as cache:
        parts = [list(cache.outputs(choices, part)) for part in images.split(4)]
    joined = [torch.cat(outputs) for outputs in zip(*parts, strict=True)]
    for ours, whole in zip(joined, cached_outputs(model, choices, images), strict=True):
        torch.testing.assert_close(ours, whole)


class Restless(Toy):
    """Takes another way every second time."""

    turn = 0

    def forward(self, x):
        self.turn += 1
        x = self.norm(self.embed(x)) if self.turn % 2 else self.embed(self.norm(x))
        return self.second(x).sum(1)


class Tiring(Toy):
    """Leaves a module out the second time."""

    turn = 0

    def forward(self, x):
        self.turn += 1
        x = self.embed(x) if self.turn > 1 else self.norm(self.embed(x))
        return self.second(x).sum(1)


class TiringAttention(WritesToHeads):
    """Normalises its queries the first time."""

    turn = 0

    def __init__(self):
        super().__init__(8, 2)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        self.turn += 1
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        heads = dvf.attention(self.norm(q) if self.turn < 2 else q, k, v)
        return self.proj(heads.transpose(1, 2).flatten(2))


class TiringInside(Toy):
    def __init__(self):
        super().__init__()
        self.second = TiringAttention().double()


@pytest.mark.parametrize("make", [Restless, Tiring, TiringInside])
def test_another_order_is_refused(make):
    model = make()
    with pytest.raises(UnsupportedError, match="another place the second time") as failure:
        cached_outputs(model, SECOND, tokens(), layers="last")
    assert "\n" not in str(failure.value)
    assert type(model) is make
    assert type(model.embed) is nn.Linear


def test_outside_of_the_block_is_refused():
    model = Toy()
    cache = PrefixCache(model, choose_layers(model, "last"))
    with pytest.raises(UsageError, match="with: expected a PrefixCache that is entered"):
        next(cache.outputs(SECOND, tokens()))


def test_an_error_of_the_model_leaves_nothing_behind():
    model = Toy()
    with PrefixCache(model, choose_layers(model, "last")) as cache:
        with pytest.raises(RuntimeError):
            list(cache.outputs(SECOND, tokens()[..., :5]))
        ours = list(cache.outputs(SECOND, tokens()))
        assert not cache._calls
    with torch.no_grad(), dvf.keep_heads(model, SECOND[1]):
        assert torch.equal(ours[1], model(tokens()))
