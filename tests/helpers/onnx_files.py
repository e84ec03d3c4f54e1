"""A made-up ONNX file with the names of a DINOv2 that PyTorch exported inside a larger model."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
MATRICES = {
    "attn.proj.weight": "attention/output/dense",
    "mlp.fc1.weight": "mlp/fc1",
    "mlp.fc2.weight": "mlp/fc2",
}


def dinov2_bytes(
    state: dict[str, Tensor],
    depth: int,
    *,
    inside: str = "backbone",
    change: Callable[[dict[str, Tensor], list[Any]], object] = lambda tensors, nodes: None,
) -> bytes:
    """ONNX bytes of the weights ``state`` of a timm ``VisionTransformer``; ``change`` edits them before.

    Only what says which tensor is which is there: the nodes that multiply by matrices, and those that read positions.
    """
    import onnx

    prefix, scope = (f"{inside}.", f"/{inside}") if inside else ("", "")
    tensors = {
        f"{prefix}embeddings.cls_token": state["cls_token"],
        f"{prefix}embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        f"{prefix}embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        f"{prefix}layernorm.weight": state["norm.weight"],
        f"{prefix}layernorm.bias": state["norm.bias"],
        "onnx::Concat_7": state["pos_embed"][:, :1],
        "onnx::Reshape_8": state["pos_embed"][:, 1:],
        "decoder.final_conv.bias": state["norm.bias"][:1],
    }
    nodes = [
        ("Concat", f"{scope}/embeddings/Concat_1", ["expanded", "patches"]),
        ("Concat", f"{scope}/embeddings/Concat_6", ["onnx::Concat_7", "resized"]),
        ("Reshape", f"{scope}/embeddings/Reshape", ["onnx::Reshape_8", "shape"]),
        ("Reshape", f"{scope}/embeddings/patch_embeddings/Reshape", ["patches", "shape"]),
    ]

    def multiply(node: str, matrix: Tensor) -> None:
        name = f"onnx::MatMul_{100 + len(nodes)}"
        tensors[name] = matrix.T
        nodes.append(("MatMul", f"{node}/MatMul", [f"{node}_input", name]))

    for i in range(depth):
        block, ours = f"{prefix}encoder.layer.{i}", f"blocks.{i}"
        node = f"{scope}/encoder/layer.{i}"
        weights = state[f"{ours}.attn.qkv.weight"].chunk(3)
        biases = state[f"{ours}.attn.qkv.bias"].chunk(3)
        parts = dict(zip(("query", "key", "value"), zip(weights, biases, strict=True), strict=True))
        for part in ("key", "value", "query"):  # in the order of an export
            multiply(f"{node}/attention/attention/{part}", parts[part][0])
            tensors[f"{block}.attention.attention.{part}.bias"] = parts[part][1]
        for mine, theirs in VECTORS.items():
            tensors[f"{block}.{theirs}"] = state[f"{ours}.{mine}"]
        for mine, theirs in MATRICES.items():
            multiply(f"{node}/{theirs}", state[f"{ours}.{mine}"])
    made = [onnx.helper.make_node(kind, read, [f"{name}_out"], name) for kind, name, read in nodes]
    change(tensors, made)
    constants = [
        onnx.numpy_helper.from_array(x.detach().contiguous().numpy(), name)
        for name, x in tensors.items()
    ]
    graph = onnx.helper.make_graph(made, "made up", [], [], constants)
    return onnx.helper.make_model(graph).SerializeToString()
