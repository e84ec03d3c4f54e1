"""ONNX export by both exporters, judged by onnxruntime at other batch sizes than the exported one."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

import diversevit_fast as dvf
from diversevit_fast.integrations import huggingface
from diversevit_fast.integrations.timm import Attention
from diversevit_fast.ops.onnx import DECOMPOSITIONS
from tests.helpers.versions import quiet_export
from tests.helpers.vits import diverse_vit, images_for

EXPORTERS = {"dynamo": True, "torchscript": False}


@pytest.fixture(params=EXPORTERS.values(), ids=EXPORTERS)
def run(request, tmp_path) -> Callable[..., Any]:
    """Export a module with a dynamic first axis, and return a function that runs the file."""

    def export(module: nn.Module, *inputs: Tensor) -> Callable[..., list[Tensor]]:
        return _session(_export(module, inputs, tmp_path / "model.onnx", dynamo=request.param))

    return export


def _export(module: nn.Module, inputs: Sequence[Tensor], path: Path, *, dynamo: bool) -> Path:
    names = [f"x{i}" for i in range(len(inputs))]
    kind = {
        True: {"dynamic_shapes": _any_batch(module, inputs)},
        False: {"input_names": names, "dynamic_axes": {name: {0: "B"} for name in names}},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, about itself and about every check
        torch.onnx.export(module, tuple(inputs), path, dynamo=dynamo, verbose=False, **kind[dynamo])
    return path


def _any_batch(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    return (shapes,) if isinstance(module, Module) else shapes


def _session(path: Path) -> Callable[..., list[Tensor]]:
    session = onnxruntime.InferenceSession(path)

    def run(*inputs: Tensor) -> list[Tensor]:
        names = [x.name for x in session.get_inputs()]
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, given)]

    return run


class Module(nn.Module):
    """A function, and what it holds."""

    def __init__(self, f: Callable[..., Any], *held: nn.Module):
        super().__init__()
        self.f, self.held = f, nn.ModuleList(held)
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        return self.f(*inputs)


def _check(run: Callable[..., Any], module: nn.Module, *inputs: Tensor) -> None:
    exported = run(module, *inputs)
    for batch in (len(inputs[0]), 1, 5):
        given = [torch.cat([x, x.flip(0)])[-batch:] for x in inputs]
        with torch.no_grad():
            wanted = module(*given)
        wanted = list(wanted) if isinstance(wanted, tuple) else [wanted]
        torch.testing.assert_close(exported(*given), wanted, rtol=1e-4, atol=1e-5)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _timm() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", attn_layer=Attention, num_classes=5, **sizes)


def _transformers() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "intermediate_size": 32}
    config = ViTConfig(num_hidden_layers=2, num_attention_heads=3, num_labels=5, **sizes)
    config._attn_implementation = huggingface.register()
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    return Module(lambda images: model(images).logits, model)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DiverseViT": (lambda: diverse_vit().float(), (3, 3, 16, 8)),
    "timm": (_timm, (3, 3, 16, 16)),
    "transformers": (_transformers, (3, 3, 16, 16)),
    "MultiHeadAttention": (lambda: dvf.nn.MultiHeadAttention(8, 2, head_dim=3), (3, 5, 8)),
    "LayerNorm": (lambda: dvf.nn.LayerNorm((5, 8)), (3, 5, 8)),
    "GELU": (dvf.nn.GELU, (3, 5)),
    "GELU tanh": (lambda: dvf.nn.GELU("tanh"), (3, 5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name, run):
    make, shape = MODELS[name]
    _check(run, make().eval(), _numbers(*shape))


def test_a_scale_of_the_heads(run):
    layer = dvf.nn.MultiHeadAttention(8, 2)
    module = Module(lambda x, s: layer(x, return_heads=True, head_scale=s), layer)
    _check(run, module, _numbers(3, 5, 8), _numbers(3, 2))


CONTEXTS = {
    "keep_heads": lambda model: dvf.keep_heads(model, {2: [0], 1: [1, 3]}),
    "capture_heads": dvf.capture_heads,
    "maps": lambda model: dvf.capture_heads(model, maps=[1, 0]),
    "HeadDiversity": dvf.HeadDiversity,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_inside_a_context(context, run):
    model = diverse_vit().float().eval()
    with CONTEXTS[context](model):
        _check(run, model, images_for(model).float())


@pytest.mark.parametrize("context", CONTEXTS)
def test_exporters_see_the_arguments_of_the_forward(context):
    """Inside as outside, by name: what is dynamic is said by them."""
    model = diverse_vit().float().eval()
    images, outside = images_for(model).float(), inspect.signature(model.forward)
    with CONTEXTS[context](model), torch.no_grad():
        assert inspect.signature(model.forward) == outside
        shapes = {"images": {0: torch.export.Dim.DYNAMIC}}
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
        more = torch.cat([images, images.flip(0)])
        torch.testing.assert_close(program.module()(more), model(more))


def test_a_pruned_model(run):
    model = dvf.prune_heads(diverse_vit().float().eval(), {2: [0], 1: [1, 3]})
    _check(run, model, images_for(model).float())


def _masked() -> tuple[Tensor, Tensor]:
    """A boolean and an additive mask; of each a row that hides all, of the latter one by finite numbers too."""
    allowed, added = _numbers(3, 1, 5, 7) > 0, _numbers(3, 1, 5, 7)
    allowed[0, 0, 1] = False
    added[0, 0, 1], added[1, 0, 2] = -torch.inf, -1e9
    return allowed, added


Q, K, V = _numbers(3, 4, 5, 8), _numbers(3, 4, 7, 8), _numbers(3, 4, 7, 6)
ALLOWED, ADDED = _masked()
ATTENTIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "plain": (dvf.attention, (Q, K, V)),
    "boolean mask": (dvf.attention, (Q, K, V, ALLOWED)),
    "additive mask": (dvf.attention, (Q, K, V, ADDED)),
    "causal": (lambda q, k, v: dvf.attention(q, k, v, is_causal=True), (Q, K, V)),
    "causal, more queries": (lambda q, k: dvf.attention(k, q, q, is_causal=True), (Q, K)),
    "negative scale": (lambda q, k, v: dvf.attention(q, k, v, scale=-0.3), (Q, K, V)),
    "grouped heads, mask": (
        lambda q, k, v, m: dvf.attention(q, k, v, m, enable_gqa=True),
        (Q, K[:, :2].contiguous(), V[:, :2].contiguous(), ALLOWED),
    ),
    "three axes": (dvf.attention, (Q[:, 0].clone(), K[:, 0].clone(), V[:, 0].clone())),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, run):
    f, inputs = ATTENTIONS[name]
    _check(run, Module(f), *inputs)


WEIGHT = _numbers(3, 2, 4, 6)
PENALTIES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "head_penalty": (lambda g: dvf.head_penalty(g, return_cosines=True), (_numbers(3, 4, 5, 2),)),
    "routed_head_penalty": (
        lambda r: dvf.routed_head_penalty(r, WEIGHT, return_cosines=True),
        (_numbers(3, 5, 3, 2, 4),),
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(name, run):
    f, inputs = PENALTIES[name]
    _check(run, Module(f), *inputs)


def test_what_is_in_the_file(tmp_path):
    """ONNX's own LayerNorm, GELU and softmax, for runtimes to fuse."""
    import onnx

    path = tmp_path / "model.onnx"
    model = diverse_vit().float().eval()
    _export(model, [images_for(model).float()], path, dynamo=True)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    depth = model.config["depth"]
    assert kinds.count("LayerNormalization") == 2 * depth + 1
    assert kinds.count("Gelu") == kinds.count("Softmax") == depth
    assert "Exp" not in kinds


def test_what_is_refused_is_refused_here_too(run):
    with pytest.raises(Exception, match="attention dropout cannot be exported to ONNX"):
        run(Module(lambda q: dvf.attention(q, q, q, dropout_p=0.1)), Q)


EVERYTHING = {name: (make, (_numbers(*shape),)) for name, (make, shape) in MODELS.items()}
EVERYTHING |= {
    name: (lambda f=f: Module(f), inputs) for name, (f, inputs) in (ATTENTIONS | PENALTIES).items()
}


def test_inductor_finds_no_decomposition_of_our_operators():
    """Where the variable ``CI`` is set, it would refuse to compile them."""
    assert len(DECOMPOSITIONS) == 5
    assert torch._decomp.get_decompositions(list(DECOMPOSITIONS)) == {}


@quiet_export
@pytest.mark.parametrize("name", ["DiverseViT", "boolean mask", "grouped heads, mask", *PENALTIES])
def test_an_exported_program_holds_our_operators_and_can_be_translated(name, tmp_path):
    make, inputs = EVERYTHING[name]
    module = make().eval()
    program = torch.export.export(module, inputs, dynamic_shapes=_any_batch(module, inputs))
    for held in (program, program.run_decompositions()):
        assert any("diversevit" in str(node.target) for node in held.graph.nodes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    with torch.no_grad():
        torch.testing.assert_close(loaded.module()(*inputs), module(*inputs))
    torch.onnx.export(loaded, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    exported = _session(tmp_path / "model.onnx")
    _check(lambda *_: exported, module, *inputs)


@quiet_export
def test_an_exported_program_with_dropout(tmp_path):
    """It runs, and draws anew at each call; ONNX has no operators for its bits."""
    program = torch.export.export(Module(lambda q: dvf.attention(q, q, q, dropout_p=0.5)), (Q,))
    one, two = (program.module()(Q) for _ in range(2))
    assert not torch.equal(one, two)
    with pytest.raises(Exception, match="attention dropout cannot be exported to ONNX"):
        torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
