"""``capture_heads(maps=)``: attention probabilities, and gradients with respect to them, against the formula."""

import copy
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from tests.attachment.test_causal_bias import BIASES
from tests.attachment.test_causal_bias import Attention as CausalAttention
from tests.attachment.test_hooks import unfused
from tests.attachment.test_zoo import made
from tests.helpers.eager import Eager
from tests.helpers.versions import compiles_losses
from tests.helpers.vits import assert_same, diverse_vit, gradients, images_for, step, timm_vit
from tests.helpers.zoo import ZOO

SEEN = [name for name, entry in ZOO.items() if "wrt='output'" not in entry.refused]


class ByFormula(Eager):
    """Keeps one module's probabilities, from which its head outputs are computed."""

    def __enter__(self):
        self.maps = []
        return super().__enter__()

    def _attend(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_
    ):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:]).bool().tril()
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, -torch.inf)
                if attn_mask.dtype == torch.bool
                else scores + attn_mask
            )
        probabilities = scores.softmax(-1)
        if self.inside:
            self.maps.append(probabilities)
        return probabilities @ value


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def rows_of(maps, whole):
    """The rows of the formula's maps that ``maps`` names."""
    if isinstance(maps, str):
        return whole[..., : 1 if maps == "class" else None, :]
    return whole[..., list(maps), :]


def derivatives(logits, whole, chosen, model, images):
    """With respect to the map, and of a loss of map and logits in the parameters; then a second derivative."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]

    def grads(loss, inputs, **options):
        options |= {"allow_unused": True, "materialize_grads": True}
        return list(torch.autograd.grad(loss, inputs, retain_graph=True, **options))

    (by_map,) = grads(logits.square().sum(), whole)
    loss = logits.sin().sum() + chosen.square().sum() + chosen[..., 0].sum()
    (penalised,) = grads(loss, images, create_graph=True)
    return by_map, grads(loss, parameters), grads(penalised.square().sum(), parameters)


@pytest.mark.parametrize("maps", ["class", "all", (2, 0, -1)], ids=str)
@pytest.mark.parametrize("name", SEEN)
def test_models_of_all_libraries(name, maps):
    entry, model, images, layer = made(name)
    images.requires_grad_()
    if maps == "class" and "Swin" in name:
        pytest.skip("refused, see below")
    torch.manual_seed(0)  # ViT-MAE shuffles its patches
    with ByFormula(layer.module) as seen:
        expect = entry.logits(model(images))
    (whole,) = seen.maps
    heads = dvf.capture_heads(model, layers=[layer.index], maps=maps)
    if maps == (2, 0, -1) and whole.shape[-2] < 4:
        with pytest.raises(UsageError, match="maps: expected indices from -1 to 0"), heads:
            model(images)
        return
    torch.manual_seed(0)
    with dvf.second_order(), heads:
        logits = entry.logits(model(images))
    same(logits, expect)
    same(heads.maps[0], rows_of(maps, whole))
    ours = derivatives(logits, heads.maps[0], heads.maps[0], model, images)
    theirs = derivatives(expect, whole, rows_of(maps, whole), model, images)
    same(ours[0], rows_of(maps, theirs[0]))
    assert_same(ours[1], theirs[1])
    assert_same(ours[2], theirs[2])


CONTEXTS = {
    "second_order": lambda model: dvf.second_order(),
    "keep_heads": lambda model: dvf.keep_heads(model, {1: [0, 2]}),
    "penalty": lambda model: dvf.HeadDiversity(model, layers=[1]),
    "penalty of outputs": lambda model: dvf.HeadDiversity(model, layers="all", wrt="output"),
    "penalty below": lambda model: dvf.HeadDiversity(model, layers=[0]),
    "capture": dvf.capture_heads,
}


def results(model, images, contexts):
    """Logits, heads, penalties and gradients, and the gradient of the logits by the map if there is one."""
    heads = [x for x in contexts if isinstance(x, dvf.capture_heads)]
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        logits = model(images)
    loss = logits.sin().sum() + sum(h[1].square().sum() for h in heads)
    for context in contexts:
        if isinstance(context, dvf.HeadDiversity):
            loss = loss + 100 * context.penalty(logits)
    for x in (h._maps[1] for h in heads if h._maps):
        (grad,) = torch.autograd.grad(logits.sum(), x, retain_graph=True)
        assert grad.abs().max() > 1e-6  # the model went on with it
    return [logits, *(h[1] for h in heads)], gradients(model, loss)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", CONTEXTS)
def test_beside_other_contexts(name, inside, watched):
    """What the others do is the same with maps and without."""
    model, images = timm_vit(), images_for(timm_vit())
    if watched:
        drop = unfused(model).get_submodule("blocks.1.attn.attn_drop")
        drop.register_forward_hook(lambda _, x, y: y.tril())

    def run(maps):
        pair = [CONTEXTS[name](model), dvf.capture_heads(model, maps=maps)]
        values, grads = results(model, images, pair if inside else pair[::-1])
        return pair[1], values, grads

    _, values, grads = run(None)
    for maps in ("class", [3, 1], "all"):
        heads, ours, our_grads = run(maps)
        for a, b in zip(ours, values, strict=True):
            same(a, b)
        assert_same(our_grads, grads)
        assert heads.maps[1].grad_fn is not None
        if not watched:
            same(heads.maps[1].sum(-1), torch.ones_like(heads.maps[1][..., 0]))


@pytest.mark.parametrize("name", ["keep_heads", "penalty of outputs"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_gradient_of_a_map_is_that_of_the_other_contexts_model(name, inside):
    model, images = timm_vit(), images_for(timm_vit())
    pair = [CONTEXTS[name](model), dvf.capture_heads(model, layers=[1], maps="class")]
    with ExitStack() as stack:
        for context in pair if inside else pair[::-1]:
            stack.enter_context(context)
        logits = model(images)
    (grad,) = torch.autograd.grad(logits.sum(), pair[1].maps[0])
    assert grad[:, [0, 2]].abs().max() > 1e-6
    assert name != "keep_heads" or not grad[:, 1].any()


@pytest.mark.parametrize("maps", ["class", "all"])
@pytest.mark.parametrize("make", [timm_vit, diverse_vit])
def test_checkpoints_and_no_grad(make, maps):
    model = make()
    images = images_for(model)

    def run(around, forward):
        heads = dvf.capture_heads(model, maps=maps)
        with around, dvf.second_order(), heads:
            logits = forward(images)
        return heads, logits

    heads, logits = run(nullcontext(), model)
    with torch.no_grad():
        quiet, value = run(nullcontext(), model)
    same(value, logits)
    same(quiet.maps[-1], heads.maps[-1].detach())
    assert not quiet.maps[-1].requires_grad
    saved, again = run(nullcontext(), lambda x: checkpoint(model, x, use_reentrant=False))
    theirs, ours = (
        gradients(model, out.sin().sum() + context.maps[0].square().sum())
        for context, out in ((heads, logits), (saved, again))
    )
    assert_same(ours, theirs)


class Multi(nn.Module):
    """``nn.MultiheadAttention`` with masks, to which one row attends to nothing."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x, need_weights=False, **options):
        y, self.weights = self.attn(
            x, x, x, need_weights=need_weights, average_attn_weights=False, **options
        )
        return y


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights):
    """The maps are the weights that PyTorch returns."""
    model = Multi().double()
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.ones(4, 4).triu(1).bool()
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    expect = model(x, True, attn_mask=mask, key_padding_mask=padding)
    weights, grads = model.weights, gradients(model, expect.sin().sum() + model.weights.sin().sum())
    for maps in ("class", (3, 1), "all"):
        with dvf.capture_heads(model, maps=maps) as heads:
            out = model(x, need_weights, attn_mask=mask, key_padding_mask=padding)
        same(out, expect)
        same(heads.maps[0], rows_of(maps, weights))
    assert_same(gradients(model, out.sin().sum() + heads.maps[0].sin().sum()), grads)
    with dvf.capture_heads(model, maps="class") as heads:
        model(x, need_weights, key_padding_mask=torch.ones(2, 4).bool())
    assert not heads.maps[0].any()


@pytest.mark.parametrize("maps", ["class", (6, 1), "all"], ids=str)
def test_a_text_model_of_transformers(maps):
    """With padding, the maps are the attentions that the model itself gives."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 32, "vocab_size": 30, "max_position_embeddings": 8}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).double().eval()
    words, present = torch.randint(1, 30, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    present[1, 4:] = 0
    model.set_attn_implementation("eager")
    expect = model(words, attention_mask=present, output_attentions=True)
    model.set_attn_implementation("sdpa")
    with dvf.capture_heads(model, maps=maps) as heads:
        out = model(words, attention_mask=present)
    same(out.last_hidden_state, expect.last_hidden_state)
    for ours, theirs in zip(heads.maps, expect.attentions, strict=True):
        same(ours, rows_of(maps, theirs))


class Grouped(nn.Module):
    """Query heads that share keys and values, a scale, and causality or a mask."""

    num_heads = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.proj = nn.Linear(16, 16)

    def forward(self, x, **options):
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.7, **options)
        return self.proj(heads.transpose(1, 2).flatten(2))


def masks():
    g = torch.Generator().manual_seed(3)
    added = torch.randn(2, 1, 5, 6, generator=g, dtype=torch.float64)[..., :5]
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "added": {"attn_mask": added},
        "boolean": {"attn_mask": added[0, 0] > -1},
        "row": {"attn_mask": added[:1, :, :1]},
        "keys alone": {"attn_mask": added[0, 0, :1]},
    }


@pytest.mark.parametrize("options", masks().values(), ids=masks())
@pytest.mark.parametrize("maps", ["class", (4, 1), "all"], ids=str)
def test_masks_causality_scale_and_shared_keys(maps, options):
    model = Grouped().double()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with ByFormula() as seen:
        seen.inside = True
        expect = model(x, **options)
    (whole,) = seen.maps
    for around in (nullcontext(), dvf.second_order(), dvf.HeadDiversity(model, wrt="output")):
        with around, dvf.capture_heads(model, maps=maps) as heads:
            out = model(x, **options)
        same(out, expect)
        same(heads.maps[0], rows_of(maps, whole))
    (grad,) = torch.autograd.grad(expect.sin().sum(), whole)
    same(torch.autograd.grad(out.sin().sum(), heads.maps[0])[0], rows_of(maps, grad))


@pytest.mark.parametrize("maps", ["class", (3, 1), "all"], ids=str)
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_causal_biases_of_pytorch(bias, maps):
    torch.manual_seed(0)
    model, x = CausalAttention(bias, 4).double(), torch.randn(2, 7, 16).double()
    expect = model(x)
    for around in (nullcontext(), dvf.second_order()):
        with around, dvf.capture_heads(model, maps=maps) as heads:
            same(model(x), expect)
        seen = torch.ones(4, 7).bool().tril(3 if bias is causal_lower_right else 0)
        seen = rows_of(maps, seen).expand_as(heads.maps[0])
        assert torch.equal(heads.maps[0] > 0, seen)
        same(heads.maps[0].sum(-1), torch.ones_like(heads.maps[0][..., 0]))


@pytest.mark.parametrize("maps", ["class", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(maps, dtype):
    """Maps are in float32; the model's tensors keep their dtype, by autocast too."""
    model, images = timm_vit().float(), images_for(timm_vit()).float()
    with dvf.capture_heads(model, maps=maps) as heads:
        expect = model(images)
    exact = heads.maps[-1]
    with torch.autocast("cpu", dtype), dvf.capture_heads(model, maps=maps) as heads:
        out = model(images)
    assert heads[-1].dtype == out.dtype == dtype
    assert heads.maps[-1].dtype == torch.float32
    torch.testing.assert_close(heads.maps[-1], exact, rtol=0.05, atol=0.01)
    torch.testing.assert_close(out.float(), expect, rtol=0.05, atol=0.02)
    torch.testing.assert_close(heads.maps[-1].sum(-1), torch.ones_like(exact[..., 0]))
    out.float().sum().backward()
    model.to(dtype)
    with dvf.capture_heads(model, maps=maps) as heads:
        assert model(images.to(dtype)).dtype == dtype
    torch.testing.assert_close(heads.maps[-1], exact, rtol=0.05, atol=0.01)


def test_copies_and_what_is_kept():
    model = timm_vit()
    images = images_for(model)
    heads = dvf.capture_heads(model, maps=True)
    with heads:
        model(images)
    assert [m.shape for m in heads.maps] == [(3, 3, 1, 5)] * 3
    copied = copy.deepcopy(heads)
    same(copied.maps[1], heads.maps[1].detach())
    assert copied.maps[1].grad_fn is None
    assert copy.copy(heads).maps[1] is heads.maps[1]
    with copied:
        copied.model(images)
    same(copied.maps[-1], heads.maps[-1])


@compiles_losses
def test_compiled_losses():
    model = timm_vit()
    images = images_for(model)
    heads = dvf.capture_heads(model, maps=True)

    def loss(model, images):
        with dvf.second_order(), heads:
            logits = model(images)
        (grad,) = torch.autograd.grad(logits.sum(), heads.maps[-1], create_graph=True)
        return grad.square().sum() + logits.square().sum() + heads[-1].sum()

    same(dvf.compile_loss(loss, backend="aot_eager")(model, images), loss(model, images))


WRONG = {
    "a word": "first",
    "nothing": [],
    "a mask": [True, False],
    "a tensor of booleans": torch.ones(3).bool(),
    "twice": [1, 1],
    "a number with a point": 1.5,
}


@pytest.mark.parametrize("maps", WRONG.values(), ids=WRONG)
def test_what_is_no_choice_of_queries(maps):
    with pytest.raises(UsageError, match=r"^maps: expected") as failure:
        dvf.capture_heads(timm_vit(), maps=maps)
    assert "\n" not in str(failure.value)


def test_refused():
    model, images = timm_vit(), images_for(timm_vit())
    with pytest.raises(UsageError, match=r"^heads\.maps: expected .* pass maps="):
        _ = dvf.capture_heads(model).maps
    heads = dvf.capture_heads(model, maps=torch.tensor(1))
    with pytest.raises(UsageError, match=r"^heads\.maps\[2\]: expected a forward"):
        _ = heads.maps[2]
    for queries, wanted in (([5], "indices from -5 to 4"), ([1, -4], "each of 5 queries once")):
        with pytest.raises(UsageError, match=wanted), dvf.capture_heads(model, maps=queries):
            model(images)
    two = dvf.capture_heads(model, layers=[1], maps=[1])
    with pytest.raises(UnsupportedError, match="two contexts"), heads, two:
        model(images)
    model = timm_vit(global_pool="avg")
    part = dvf.HeadDiversity(model, fraction=0.5)
    with pytest.raises(UnsupportedError, match="fraction"), part, dvf.capture_heads(model):
        model(images)
    with part, dvf.capture_heads(model, layers=[0, 1]) as below:  # blocks that run whole
        model(images)
    assert len(below[1]) == len(images)
    swin = made("timm Swin")[1]
    with pytest.raises(UnsupportedError, match="within windows"):
        dvf.capture_heads(swin, maps="class")
    assert step(model, dvf.HeadDiversity(model), images)[1] > 0  # the model is as it was
