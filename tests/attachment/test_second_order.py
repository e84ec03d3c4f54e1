"""``dvf.second_order``: a gradient penalty of anyone's model, against the formula in float64."""

import threading
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast._torch_internals import function_modes
from diversevit_fast.attachment.torch_calls import in_second_order
from diversevit_fast.errors import UnsupportedError, UsageError
from tests.attachment.test_zoo import made
from tests.helpers.eager import Eager
from tests.helpers.second_order import TAILS, WAYS
from tests.helpers.vits import timm_vit
from tests.helpers.zoo import ZOO


def penalised(f, x, also=lambda: 0.0):
    """A loss with a gradient penalty (R1) of ``f``; its gradient needs the double backward."""
    x = x.detach().requires_grad_()
    out = f(x)
    (grad,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    return out.pow(3).sum() + grad.square().sum() + also()


def gradients(f, x, parameters, *contexts, also=lambda: 0.0):
    """The gradient of the penalised loss, with the forward inside ``contexts``."""

    def inside(x):
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return f(x)

    parameters = [p for p in parameters if p.requires_grad and p.numel()]
    loss = penalised(inside, x, also)
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def assert_same(ours, theirs):
    """Equal to float64 rounding of the largest gradient, and not all zero."""
    largest = max(g.abs().max().item() for g in theirs)
    assert largest > 1e-6
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * largest)


def by_formula(f, x, parameters):
    """The same with attention by PyTorch's formula, all the way through the backward passes."""
    with sdpa_kernel(SDPBackend.MATH):
        return gradients(f, x, parameters)


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("name", ZOO)
def test_models_of_all_libraries(name):
    entry, model, images, _ = made(name)

    def logits(x):
        return entry.logits(model(x))

    ours = gradients(logits, images, model.parameters(), dvf.second_order(model))
    assert_same(ours, gradients(logits, images, model.parameters(), Eager()))


class Decoder(nn.Module):
    """PyTorch's transformer: self-attention with a causal mask and with padding, cross-attention."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Transformer(16, 2, 1, 2, 24, 0.0, F.gelu, batch_first=True)

    def forward(self, x):
        causal = self.whole.generate_square_subsequent_mask(3, dtype=x.dtype)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return self.whole(x, x[:, :3], tgt_mask=causal, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_transformers_of_pytorch(training, frozen):
    torch.manual_seed(0)
    model = Decoder().double().train(training)
    if frozen:
        model.whole.encoder.requires_grad_(False)
    x = tokens(2, 5, 16)
    ours = gradients(model, x, model.parameters(), dvf.second_order())
    assert_same(ours, by_formula(model, x, model.parameters()))


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_of_asking(way, tail):
    x = [tokens(2, 3, 4, 8).roll(i) for i in range(3)]

    def inside(*x):
        with dvf.second_order():
            return F.scaled_dot_product_attention(*x, is_causal=True)

    def formula(*x):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*x, is_causal=True)

    if way.__name__ in ("by_checkpoint", "by_compiled_loss"):
        wanted = WAYS["autograd.grad"](formula, x, tail)
    else:
        wanted = way(formula, x, tail)
    assert_same(way(inside, x, tail), wanted)


ORDERS = {"around": (0, 1), "inside": (1, 0)}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("layers", ["last", "all", [0]], ids=str)
@pytest.mark.parametrize("name", ["timm vit", "torch encoder"])
def test_with_the_head_penalty(name, layers, order):
    """R1 plus head penalty: below the first chosen layer only this context makes it differentiable."""
    torch.manual_seed(0)
    model, x = stock(name)
    parameters = list(model.parameters())
    kept = []

    def run(*contexts, diversity):
        def logits(x):
            kept[:] = [model(x)]
            return kept[0]

        return gradients(
            *(logits, x, parameters, *contexts), also=lambda: 10 * diversity.penalty(kept[0])
        )

    ours = dvf.HeadDiversity(model, layers=layers)
    blocks = (dvf.second_order(model), ours)
    got = run(*(blocks[i] for i in order), diversity=ours)
    reference = dvf.HeadDiversity(model, layers=layers)
    with dvf.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        assert_same(got, run(reference, diversity=reference))


def stock(name):
    """A stock model of that name and its input."""
    if name == "timm vit":
        return timm_vit().double(), tokens(2, 3, 16, 16)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, F.gelu, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.encoder(x)[:, 0])

    return Encoder().double(), tokens(2, 5, 16)


@pytest.mark.parametrize("name", ["timm vit", "torch encoder"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_with_captured_and_masked_heads(name, order):
    torch.manual_seed(0)
    model, x = stock(name)
    heads = dvf.capture_heads(model, layers=[1])
    outer = [dvf.second_order(), dvf.keep_heads(model, {0: [1]})]
    contexts = [*(outer[i] for i in order), heads]
    parameters = list(model.parameters())

    def logits(x):
        return model(x)

    ours = gradients(logits, x, parameters, *contexts, also=lambda: heads[0].square().sum())
    with sdpa_kernel(SDPBackend.MATH):
        wanted = gradients(
            *(logits, x, parameters, dvf.keep_heads(model, {0: [1]}), heads),
            also=lambda: heads[0].square().sum(),
        )
    assert_same(ours, wanted)


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_recompute_inside(nested):
    """The blocks are recomputed by both backward passes, outside the ``with`` block."""
    torch.manual_seed(0)
    model, x = stock("timm vit")
    parameters = list(model.parameters())
    wanted = by_formula(model, x, parameters)
    model.set_grad_checkpointing()
    model.train()

    def whole(x):
        return checkpoint(model, x, use_reentrant=False)

    assert_same(gradients(whole if nested else model, x, parameters, dvf.second_order()), wanted)
    assert not in_second_order()
    assert not function_modes()


@pytest.mark.parametrize("attend", [F.scaled_dot_product_attention, F.gelu], ids=["sdpa", "gelu"])
def test_reentrant_checkpoints_are_refused(attend):
    x = tokens(1, 2, 3, 4).requires_grad_()
    arguments = (x, x, x) if attend is F.scaled_dot_product_attention else (x,)
    with dvf.second_order(), pytest.raises(UnsupportedError, match="use_reentrant=False"):
        checkpoint(attend, *arguments, use_reentrant=True)


def test_without_gradients_the_functions_are_pytorchs_own():
    x = tokens(1, 2, 3, 4).float()
    with torch.no_grad():
        with dvf.second_order():
            inside = F.scaled_dot_product_attention(x, x, x), F.gelu(x), F.layer_norm(x, (4,))
        outside = F.scaled_dot_product_attention(x, x, x), F.gelu(x), F.layer_norm(x, (4,))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_forward_mode_without_gradients():
    x = tokens(1, 2, 3, 4)
    with torch.no_grad(), dvf.second_order():
        _, ours = torch.func.jvp(lambda y: F.scaled_dot_product_attention(y, y, y), (x,), (x,))
    with sdpa_kernel(SDPBackend.MATH):
        _, wanted = torch.func.jvp(lambda y: F.scaled_dot_product_attention(y, y, y), (x,), (x,))
    assert_same([ours], [wanted])


def twice(context=nullcontext):
    """Whether attention in ``context`` has a double backward."""
    x = tokens(1, 2, 3, 4).requires_grad_()
    with context():
        out = F.scaled_dot_product_attention(x, x, x)
    (grad,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(grad.square().sum(), x)
    except RuntimeError as failure:
        return "is not implemented" not in str(failure)
    return True


def test_blocks_nest_and_end_in_any_order():
    assert not twice()
    outer, inner = dvf.second_order(), dvf.second_order()
    with outer:
        with inner:
            assert twice()
        assert twice()
    assert not twice()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert twice()
    inner.__exit__(None, None, None)
    assert not twice()
    assert not function_modes()


def test_an_exception_ends_the_block():
    with pytest.raises(ZeroDivisionError), dvf.second_order():
        1 / 0  # noqa: B018
    assert not twice()


def test_a_generator_that_is_closed_ends_its_block():
    def inside():
        with dvf.second_order():
            yield twice()

    running = inside()
    assert next(running)
    running.close()
    assert not twice()


def test_other_threads_are_left_alone():
    seen = []
    with dvf.second_order():
        thread = threading.Thread(target=lambda: seen.append(twice()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_one_context_is_entered_once_at_a_time():
    context = dvf.second_order()
    with context, pytest.raises(UsageError, match="make another"):
        context.__enter__()
    with context:
        assert twice()


def test_what_is_no_model_is_refused():
    with pytest.raises(UsageError, match=r"model: expected a torch.nn.Module"):
        dvf.second_order("vit")


def test_a_compiled_module_is_refused_at_entry():
    model, _ = stock("torch encoder")
    model.encoder.layers[1] = torch.compile(model.encoder.layers[1], backend="eager")
    with pytest.raises(UnsupportedError, match=r"model: encoder.layers.1 is compiled"):
        dvf.second_order(model).__enter__()
    assert not function_modes()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_code_inside_is_refused(fullgraph):
    torch._dynamo.reset()
    x = tokens(1, 2, 3, 4).requires_grad_()
    compiled = torch.compile(
        lambda y: F.scaled_dot_product_attention(y, y, y), backend="eager", fullgraph=fullgraph
    )
    kind = torch._dynamo.exc.Unsupported if fullgraph else UnsupportedError
    with dvf.second_order(), pytest.raises(kind, match="compiled code runs inside the block"):
        compiled(x)


def test_a_block_in_a_compiled_function_is_refused():
    torch._dynamo.reset()

    def attend(x):
        with dvf.second_order():
            return F.scaled_dot_product_attention(x, x, x)

    with pytest.raises(UnsupportedError, match=r"use dvf\.compile_loss"):
        torch.compile(attend, backend="eager")(tokens(1, 2, 3, 4).requires_grad_())


def test_an_implementation_that_cannot_be_seen_is_refused():
    model, _ = stock("torch encoder")
    model.config = type("Config", (), {"_attn_implementation": "flash_attention_2"})()
    with pytest.raises(UnsupportedError, match=r"set_attn_implementation\('sdpa'\)"):
        dvf.second_order(model).__enter__()


def test_attention_dropout():
    x = tokens(1, 2, 3, 4).requires_grad_()
    torch.manual_seed(0)
    with dvf.second_order():
        found = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(found, dvf.attention(x, x, x, dropout_p=0.5))
