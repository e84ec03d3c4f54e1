"""Nothing that cannot be differentiated twice slips in between the steps of one context."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_fast.attachment.graph_checks import depends_on
from diversevit_fast.errors import UnsupportedError, UsageError
from tests.helpers.vits import images_for, step, timm_vit


def vit():
    return timm_vit(global_pool="avg", class_token=False)


class Reentrant(nn.Module):
    """Runs a module in reentrant checkpointing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=True)


class Once(torch.autograd.Function):
    """Its second derivative is refused by ``backward``, and dropped where single gradients are asked for."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Squared(nn.Module):
    """Runs a module and what is differentiable once."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return Once.apply(self.inner(x))


def compiled(module):
    return torch.compile(module, backend="aot_eager")


OPAQUE = {"reentrant": Reentrant, "compiled": compiled, "once": Squared}
PLACES = ("blocks.2", "blocks.2.mlp", "blocks.2.norm2", "fc_norm", "head")


def put(model, name, module):
    """Put ``module`` in the place of another, which is returned."""
    parent, _, last = name.rpartition(".")
    owner, before = model.get_submodule(parent), model.get_submodule(name)
    setattr(owner, last, module)
    return before


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("opaque", OPAQUE.values(), ids=OPAQUE)
@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_swapped_in_after_some_steps(opaque, place, layers):
    """As many nodes or fewer than in the steps before, which were right: only the kind of one node tells."""
    torch._dynamo.reset()
    model = vit()
    images, diversity = images_for(model), dvf.HeadDiversity(model, layers=layers)
    expect = [step(model, diversity, images)[1] for _ in range(2)][1]
    before = put(model, place, opaque(model.get_submodule(place)))
    for _ in range(2):
        with pytest.raises(
            UnsupportedError, match=r"compile only|use_reentrant=False|marked once_diff"
        ):
            step(model, diversity, images)
    put(model, place, before)
    torch.testing.assert_close(step(model, diversity, images)[1], expect)


def test_checkpointing_switched_on_between_steps():
    model = vit()
    images, diversity = images_for(model), dvf.HeadDiversity(model)
    _, expect = step(model, diversity, images)
    model.set_grad_checkpointing()
    _, found = step(model, diversity, images)
    torch.testing.assert_close(found, expect)


@pytest.mark.parametrize("opaque", OPAQUE.values(), ids=OPAQUE)
def test_other_logits_than_in_the_steps_before(opaque):
    """What makes them of the model's output is outside the block."""
    torch._dynamo.reset()
    model = vit()
    images, diversity = images_for(model), dvf.HeadDiversity(model)
    last = opaque(nn.Linear(5, 5).double())
    step(model, diversity, images)
    with diversity:
        logits = model(images)
    with pytest.raises(UnsupportedError, match="what makes the logits"):
        diversity.penalty(last(logits))
    with diversity:
        stale = model(images)
    with diversity:
        logits = model(images)
    with pytest.raises(UsageError, match="logits computed under this context"):
        diversity.penalty(stale)
    with diversity:
        logits = model(images)
    assert diversity.penalty(logits) > 0


class TestDependsOn:
    def graph(self):
        x = torch.ones(2, requires_grad=True)
        return x, x.sin()

    def test_of_each_group(self):
        x, captured = self.graph()
        other = captured.cos()
        found = depends_on(captured.exp().sum(), [[captured], [other], [other, x], [x]])
        assert found == [True, False, True, True]

    @pytest.mark.parametrize("opaque", OPAQUE.values(), ids=OPAQUE)
    def test_beside_the_captured_tensor(self, opaque):
        """A path that is clear does not hide another."""
        torch._dynamo.reset()
        x, captured = self.graph()
        hard = opaque(nn.Linear(2, 2))
        clear = captured.exp().sum()
        with pytest.raises(UnsupportedError, match="what makes the logits"):
            depends_on(clear + hard(captured.cos()).sum(), [[captured]])
        with pytest.raises(UnsupportedError, match="what makes the logits"):
            depends_on(hard(captured).sum(), [[captured]])
        for below in (hard(x.exp()), hard(x).cos() + 0 * x):
            assert depends_on((captured + below).sum(), [[captured]]) == [True]

    @pytest.mark.parametrize("opaque", OPAQUE.values(), ids=OPAQUE)
    def test_it_made_the_captured_tensor_or_there_is_none(self, opaque):
        torch._dynamo.reset()
        x, _ = self.graph()
        hard = opaque(nn.Linear(2, 2))
        captured = hard(x.sin())
        with pytest.raises(UnsupportedError, match="what makes the logits"):
            depends_on(captured.sum(), [[captured]])
        with pytest.raises(UnsupportedError, match="what makes the logits"):
            depends_on(hard(x.sin()).cos().sum(), [[x.exp()]])

    @pytest.mark.parametrize("opaque", OPAQUE.values(), ids=OPAQUE)
    def test_what_was_there_earlier_is_left_out(self, opaque):
        torch._dynamo.reset()
        x, hard = torch.ones(2, requires_grad=True), opaque(nn.Linear(2, 2))
        stream = hard(x).cos()
        captured = stream.sin()
        earlier = {stream.grad_fn}
        assert depends_on((stream + captured).sum(), [[captured]], earlier) == [True]
        assert depends_on((stream + captured).sum(), [[captured], [stream]], earlier) == [True] * 2
        with pytest.raises(UnsupportedError, match="what makes the logits"):
            depends_on((stream + hard(stream + captured)).sum(), [[captured]], earlier)
        with pytest.raises(UnsupportedError, match="what makes the logits"):
            depends_on(stream.sum(), [[captured]], earlier)  # of none of them
        assert depends_on(x.sin().sum(), [[captured]], earlier) == [False]

    def test_a_captured_leaf(self):
        leaf, other = (torch.ones(2, requires_grad=True) for _ in range(2))
        assert depends_on((2 * leaf).sum(), [[leaf], [other]]) == [True, False]
        assert depends_on((2 * leaf.cos()).sum(), [[other], [leaf, other]]) == [False, True]


def test_a_recurrent_model():
    """A second run of the first layer's block is not taken for what was there before the first one."""
    torch._dynamo.reset()
    model = vit()
    images, block = images_for(model), model.blocks[2]
    hard = compiled(nn.Linear(model.embed_dim, model.embed_dim).double())

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = block
            self.between = [nn.Identity()]

        def forward(self, x):
            return self.inner(self.between[0](self.inner(x)))

    model.blocks[2] = outer = Outer()
    diversity = dvf.HeadDiversity(model)
    assert step(model, diversity, images)[1] > 0
    outer.between[0] = hard
    with pytest.raises(UnsupportedError, match="what makes the logits"):
        step(model, diversity, images)


def test_nothing_of_a_step_is_kept_alive():
    model = vit()
    diversity = dvf.HeadDiversity(model)
    step(model, diversity, images_for(model))
    assert diversity._recording.earlier == set()
    assert diversity._recording.runs == []


@pytest.mark.parametrize("place", ["blocks.1.mlp", "blocks.2.mlp", "blocks.2.norm2"])
def test_differentiable_once_inside_checkpointed_blocks(place):
    """Taken by single gradients there, as ``autograd.grad`` of a whole model."""
    model = vit().train()
    model.set_grad_checkpointing()
    put(model, place, Squared(model.get_submodule(place)))
    with pytest.raises(UnsupportedError, match="marked once_differentiable"):
        step(model, dvf.HeadDiversity(model, layers="all"), images_for(model))
    if place == "blocks.1.mlp":  # the layer is above it
        step(model, dvf.HeadDiversity(model, layers="last"), images_for(model))
