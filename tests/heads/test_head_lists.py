"""Heads and layers: integers of any kind are taken, booleans are not, and pruning is all or nothing."""

import contextlib
import copy
import gc
import os
import signal
import sys
import warnings
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import diversevit_fast as dvf
from diversevit_fast.errors import UnsupportedError, UsageError
from diversevit_fast.heads import module_swap as swap
from diversevit_fast.heads import pruning
from tests.helpers import vits
from tests.helpers.vits import images_for, timm_vit

diverse_vit = partial(vits.diverse_vit, depth=2)


def snapshot(model):
    """Every module's class, attributes and parameters, these by identity and by value."""
    modules = [
        (module, type(module), dict(vars(module)), dict(module._parameters))
        for module in model.modules()
    ]
    values = {name: value.clone() for name, value in model.state_dict().items()}

    def check():
        for module, cls, attributes, parameters in modules:
            assert type(module) is cls
            assert list(vars(module)) == list(attributes)
            for name, value in attributes.items():
                assert vars(module)[name] is value
            assert list(module._parameters) == list(parameters)
            assert all(module._parameters[name] is p for name, p in parameters.items())
        state = model.state_dict()
        assert list(state) == list(values)
        assert all(torch.equal(state[name], value) for name, value in values.items())

    return check


HEADS = {  # the heads 0 and 2
    "list": [2, 0],
    "tuple": (0, 2),
    "set": {2, 0},
    "range": range(0, 3, 2),
    "generator": lambda: (h for h in (2, 0)),
    "dictionary's keys": {0: None, 2: None}.keys(),
    "array": np.array([2, 0]),
    "bytes of an array": np.array([0, 2], dtype=np.uint8),
    "numpy integers": [np.int64(2), np.int32(0)],
    "arrays without axes": [np.array(2), np.array(0)],
    "tensor": torch.tensor([2, 0]),
    "topk": torch.tensor([3.0, 1.0, 2.0, 0.0]).topk(2).indices,
    "argsort": np.argsort([0.0, 2.0, 1.0, 3.0])[:2],
    "short tensor": torch.tensor([0, 2], dtype=torch.uint8),
    "tensors without axes": list(torch.tensor([2, 0])),
    "mixed": [np.int64(2), torch.tensor(0)],
}


def made(heads):
    return heads() if callable(heads) else heads


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_any_integers(name):
    model = diverse_vit()
    images = images_for(model)
    with dvf.keep_heads(model, {-1: [0, 2]}):
        expect = model(images)
    with dvf.keep_heads(model, {-1: made(HEADS[name])}):
        assert torch.equal(model(images), expect)
    report = dvf.pruning_report(model, {-1: made(HEADS[name])}, images)
    assert report.model.parameters[0] > report.model.parameters[1]
    dvf.prune_heads(model, {-1: made(HEADS[name])})
    assert model.blocks[1].attn.kept_heads == (0, 2)
    assert all(type(head) is int for head in model.blocks[1].attn.kept_heads)
    torch.testing.assert_close(model(images), expect)


ONE = [2, np.int64(2), np.array(2), np.array([2]), torch.tensor(2), torch.tensor([2])]
ONE += [torch.tensor([0.0, 1.0, 5.0]).argmax()]


@pytest.mark.parametrize("head", ONE, ids=repr)
@pytest.mark.parametrize("layer", [-1, np.int64(1), torch.tensor(-1)], ids=repr)
def test_one_head_and_layers_of_any_integers(head, layer):
    model = dvf.prune_heads(diverse_vit(), {layer: head})
    assert model.kept_heads == {0: (0, 1, 2, 3), 1: (2,)}


LAYERS = [[0, -1], (1, 0), {0, 1}, range(2), np.arange(2), torch.arange(2), [np.int64(0), 1]]
LAYERS += [list(torch.tensor([-1, -2])), np.array([0, 1], dtype=np.int8)]


@pytest.mark.parametrize("layers", [*LAYERS, None], ids=repr)
def test_layers_of_any_integers(layers):
    model = diverse_vit()
    images = images_for(model)

    def given():
        return layers if layers is not None else (layer for layer in (0, 1))

    assert [x.index for x in dvf.HeadDiversity(model, layers=given()).layers] == [0, 1]
    with dvf.capture_heads(model, layers=given()) as heads:
        model(images)
    assert len(heads) == 2
    assert heads[np.int64(1)] is heads[torch.tensor(-1)]
    data = [(images, torch.zeros(3, dtype=torch.long))]
    found = [choice.kept for choice in dvf.select_heads(model, data, layers=given())]
    assert len(found) == 8
    assert all(type(i) is int for kept in found for i in (*kept, *kept[next(iter(kept))]))


@pytest.mark.parametrize("layer", [1, np.int64(-1), torch.tensor(1)], ids=repr)
def test_one_layer(layer):
    model = diverse_vit()
    assert [x.index for x in dvf.HeadDiversity(model, layers=layer).layers] == [1]
    assert len(dvf.capture_heads(model, layers=layer)) == 1


MASK = "for a mask pass the numbers"
BAD_HEADS = {
    "mask": ([True, False, True, False], MASK),
    "short mask": ([True, False], MASK),
    "one true": ([True], MASK),
    "true": (True, MASK),
    "numpy mask": (np.array([True, False, False, True]), MASK),
    "numpy boolean": ([np.True_], MASK),
    "numpy boolean alone": (np.True_, MASK),
    "tensor mask": (torch.tensor([True, False, True, False]), MASK),
    "boolean tensors": (list(torch.tensor([True, False])), MASK),
    "boolean tensor": (torch.tensor(True), MASK),
    "a mask among heads": ([0, True], MASK),
    "generated mask": (lambda: (h > 1 for h in range(4)), MASK),
    "two axes": (np.array([[0, 1]]), "keep at least one"),
    "tensor of two axes": (torch.tensor([[0], [1]]), "keep at least one"),
    "nested": ([[0]], "keep at least one"),
    "tensors of one axis": ([torch.tensor([0])], "keep at least one"),
    "floats": ([0.0, 2.0], "got [0.0, 2.0]"),
    "float tensor": (torch.tensor([0.0]), "keep at least one"),
    "float": (1.0, "got 1.0"),
    "none": (None, "got None"),
    "string": ("0", "got '0'"),
    "bytes": (b"\x00\x01", "got b"),
    "words": (["0", "1"], "got ['0', '1']"),
    "dictionary": ({0: True}, "got {0: True}"),
    "no data": (torch.zeros(2, dtype=torch.long, device="meta"), "keep at least one"),
    "empty array": (np.array([], dtype=int), "got []"),
    "empty range": (range(0), "got []"),
    "empty generator": (lambda: iter(()), "got []"),
    "numpy twice": (np.array([1, 1]), "got [1, 1]"),
    "twice, otherwise": ([1, torch.tensor(1)], "got [1, 1]"),
    "out of range": (torch.tensor([1, 4]), "got [1, 4]"),
    "negative": (np.array([-1]), "got [-1]"),
    "huge": (range(10**12), "got [0, 1, 2, 3, 4]"),
    "endless": (count, "got [0, 1, 2, 3, 4]"),
}


@pytest.mark.parametrize("name", BAD_HEADS)
@pytest.mark.parametrize("act", [dvf.keep_heads, dvf.prune_heads])
def test_what_are_no_heads(name, act):
    """Wrong heads are refused before anything is changed, also in the first layer."""
    model = diverse_vit()
    heads, message = BAD_HEADS[name]
    check = snapshot(model)
    with pytest.raises(UsageError) as failure:
        act(model, {0: [1], -1: made(heads)})
    said = str(failure.value)
    assert said.startswith("heads: expected a list of different heads from 0 to 3 for layer 1")
    assert message in said
    assert "\n" not in said
    assert len(said) < 250
    check()


BAD_LAYERS = [True, False, np.True_, torch.tensor(True), 0.0, "0", None, 2, np.int64(-3)]
BAD_LAYERS += [torch.tensor(2), (0,), np.float64(1)]


@pytest.mark.parametrize("layer", BAD_LAYERS, ids=repr)
def test_what_is_no_layer(layer):
    model = diverse_vit()
    check = snapshot(model)
    for call in (
        lambda: dvf.keep_heads(model, {layer: [0]}),
        lambda: dvf.prune_heads(model, {1: [0], layer: [0]} if layer != 1 else {layer: [0]}),
        lambda: dvf.HeadDiversity(model, layers=[0, layer]),
        lambda: dvf.capture_heads(model, layers=[layer]),
        lambda: dvf.select_heads(model, [], layers=[layer]),
    ):
        with pytest.raises(UsageError, match=r"^layers: expected layer indices") as failure:
            call()
        assert "\n" not in str(failure.value)
    check()


BAD_LISTS = [True, np.array([]), torch.tensor([]), set(), range(0), None, 1.5, {}, {0: 1}]
BAD_LISTS += [torch.tensor([True, False]), np.array([True]), b"\x00", np.arange(4).reshape(2, 2)]


@pytest.mark.parametrize("layers", BAD_LISTS, ids=repr)
def test_what_are_no_layers(layers):
    model = diverse_vit()
    for call in (
        lambda: dvf.HeadDiversity(model, layers=layers),
        lambda: dvf.capture_heads(model, layers=layers),
        lambda: dvf.select_heads(model, [], layers=layers),
    ):
        with pytest.raises(UsageError, match=r"^layers: expected") as failure:
            call()
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize("position", [True, np.False_, torch.tensor(True), 0.0, "0", slice(1)])
def test_what_is_no_position(position):
    model = diverse_vit()
    with dvf.capture_heads(model) as heads:
        model(images_for(model))
        with pytest.raises(UsageError, match=r"^heads: expected the position of a chosen layer"):
            heads[position]


def test_a_generator_that_fails():
    model = diverse_vit()
    check = snapshot(model)

    def heads():
        yield 0
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        dvf.prune_heads(model, {0: [1], 1: heads()})
    check()


# Pruning is all or nothing


def hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 32, "image_size": 16, "patch_size": 4, "num_labels": 5}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


MODELS = {"diverse-vit": diverse_vit, "timm": partial(timm_vit, depth=2), "hf": hugging_face}
KEPT = {0: [0, 2], 1: [1]}


class FailsAt:
    """A function whose nth call raises, before or after its work."""

    def __init__(self, plain, n, error, after):
        self.plain, self.left, self.error, self.after = plain, n, error, after

    @property
    def call(self):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0 and not self.after:
                raise self.error
            result = self.plain(*args, **kwargs)
            if self.left == 0:
                raise self.error
            return result

        return call


STEPS = {
    "set": (nn.Module, "__setattr__"),
    "register": (nn.Module, "register_parameter"),
    "copy": (torch.Tensor, "clone"),
    "select": (torch.Tensor, "index_select"),
    "parameter": (pruning, "_like"),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_failure_at_any_step_changes_nothing(make, step, error, monkeypatch):
    owner, name = STEPS[step]
    plain = getattr(owner, name)
    monkeypatch.setattr(pruning, "warn_of_optimizers", lambda _: None)  # takes a tenth of a second
    for n in range(1, 100):
        model = make()
        check = snapshot(model)
        for after in (False, True):
            failing = FailsAt(plain, n, error, after)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing.call)
                with contextlib.suppress(error):
                    dvf.prune_heads(model, KEPT)
            if failing.left > 0:
                assert n > 4  # every step of both layers was reached
                return
            check()
    raise AssertionError("never got through")


def interrupted_at(n, code):
    """A tracer that sends what Ctrl-C sends at the nth line that runs in functions of ``code``."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code not in code:
            return None
        seen += event == "line"
        if event == "line" and seen == n:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGINT)
        return trace

    return trace


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_at_any_line_changes_all_or_nothing(monkeypatch, interruptible):
    monkeypatch.setattr(pruning, "warn_of_optimizers", lambda _: None)
    setters = (swap.swap, swap._current, dvf.prune_heads)
    code = [f.__code__ for f in (*setters, nn.Module.__setattr__, nn.Module.register_parameter)]
    template, pruned, whole, before = diverse_vit(), 0, 0, sys.gettrace()
    for n in count(1):
        model = copy.deepcopy(template)
        check = snapshot(model)
        sys.settrace(interrupted_at(n, code))
        try:
            dvf.prune_heads(model, KEPT)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if model.kept_heads[1] == (1,):
            assert model.kept_heads[0] == (0, 2)
            assert model(images_for(model)).shape == (3, 2)
            pruned += 1
        else:
            check()
            whole += 1
    assert whole > 50
    assert pruned  # between the last change and the return


# What becomes of others that hold the parameters


class TestOptimizers:
    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
    def test_one_that_holds_replaced_parameters_is_told_of(self, kind):
        model = diverse_vit()
        optimizer = kind(model.parameters(), lr=0.1)
        with pytest.warns(UserWarning, match=f"{kind.__name__} holds parameters that pruning"):
            dvf.prune_heads(model, {0: [1]})
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert id(model.blocks[0].attn.qkv.weight) not in held

    def test_as_an_error_it_comes_before_anything_is_changed(self):
        model = diverse_vit()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        check = snapshot(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="make a new optimizer"):
                dvf.prune_heads(model, {0: [1]})
        check()
        del optimizer

    def test_others_are_not(self):
        """No warning of optimizers of other parameters, made afterwards, or deleted."""
        model, other = diverse_vit(), diverse_vit()
        kept = [
            torch.optim.SGD(other.parameters(), lr=0.1),
            torch.optim.SGD(model.head.parameters(), lr=0.1),
        ]
        gone = torch.optim.SGD(model.parameters(), lr=0.1)
        del gone
        gc.collect()
        dvf.prune_heads(model, {0: [1]})
        kept.append(torch.optim.SGD(model.parameters(), lr=0.1))
        before = model.blocks[0].attn.qkv.weight.clone()
        model(images_for(model)).sum().backward()
        kept[-1].step()
        assert not torch.equal(model.blocks[0].attn.qkv.weight, before)

    def test_the_docstring_says_so(self):
        assert "optimizer" in dvf.prune_heads.__doc__


class TestInUse:
    def refused(self, model, match):
        check = snapshot(model)
        with pytest.raises(UnsupportedError, match=match) as failure:
            dvf.prune_heads(model, {0: [1], 1: [2]})
        assert "\n" not in str(failure.value)
        check()

    def test_inside_a_context(self):
        model = diverse_vit()
        for context in (dvf.HeadDiversity(model), dvf.keep_heads(model, {1: [0]})):
            with context:
                self.refused(model, "leave the block first")
        with dvf.HeadDiversity(diverse_vit()), dvf.second_order(model):
            dvf.prune_heads(model, {0: [1]})

    def test_heads_kept_of_a_model_pruned_since(self):
        model = diverse_vit()
        kept = dvf.keep_heads(model, {1: [0]})
        dvf.prune_heads(model, {1: [1]})
        with kept, pytest.raises(UsageError, match="make keep_heads after pruning"):
            model(images_for(model))

    def test_shared_linear_layers(self):
        model = diverse_vit()
        model.blocks[1].attn.proj = model.blocks[0].attn.proj
        self.refused(model, "shares a linear layer")

    @pytest.mark.parametrize("name", ["qkv", "proj"])
    @pytest.mark.parametrize("wrapped", ["parametrised", "pruned by torch"])
    def test_weights_that_are_not_the_module_s_own(self, wrapped, name):
        model = diverse_vit()
        linear = getattr(model.blocks[1].attn, name)
        if wrapped == "parametrised":
            nn.utils.parametrizations.weight_norm(linear)
        else:
            prune.random_unstructured(linear, "weight", 0.5)
        self.refused(model, "parametrised")
        assert not dvf.supported(model)[1].allows("prune")
        assert dvf.supported(model)[0].allows("prune")

    def test_distributed_data_parallel(self):
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            whole = nn.parallel.DistributedDataParallel(diverse_vit())
            self.refused(whole, "DDP averages the gradients")
        finally:
            torch.distributed.destroy_process_group()
