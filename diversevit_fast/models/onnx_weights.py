"""Read the DINOv2 backbone of an exported ONNX file, under timm's names.

The file is one that PyTorch exported from transformers' ``Dinov2Model``, alone or inside a larger model. Its vectors
(biases, norms, layer scales) keep their names. Its matrices lost theirs (``onnx::MatMul_1966``) and are transposed; the
names of the nodes that multiply by them tell them apart. The position embedding was cut in two: class and patches.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError, require
from ..files import read_bytes
from ..weight_files import StrPath, existing_file, path_error

_HINT = "pass a DINOv2 that was exported from transformers"
_VECTORS = {  # ours -> transformers', of a block
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
_MATRICES = {  # ours -> the node that multiplies by it, of a block
    "attn.proj.weight": "attention/output/dense/MatMul",
    "mlp.fc1.weight": "mlp/fc1/MatMul",
    "mlp.fc2.weight": "mlp/fc2/MatMul",
}
_QKV = ("query", "key", "value")
_FIRST_QUERY = re.compile(r"(/.*)?/encoder/layer\.0/attention/attention/query/MatMul")


class _Graph(NamedTuple):
    """What is looked up in an ONNX file."""

    path: StrPath
    tensors: dict[str, Tensor]
    nodes: dict[str, Any]

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise path_error(self.path, f"the tensor {name}", "a file without", _HINT)
        return self.tensors[name]

    def matrix(self, node: str) -> Tensor:
        """The constant that ``node`` multiplies by, as a linear layer's weight."""
        if node not in self.nodes:
            raise path_error(self.path, f"the node {node}", "a file without", _HINT)
        found = [x for x in self.nodes[node].input if x in self.tensors]
        if len(found) != 1 or self.tensors[found[0]].ndim != 2:
            raise path_error(self.path, f"one matrix at {node}", f"{len(found)} constants", _HINT)
        return self.tensors[found[0]].T.contiguous()

    def constant_of(self, kind: str, scope: str, width: int, other_than: str) -> Tensor:
        """The one constant ``[1, n, width]`` that nodes of one kind read directly inside ``scope``."""
        names = {
            name
            for node in self.nodes.values()
            if node.op_type == kind and re.fullmatch(rf"{re.escape(scope)}/[^/]*", node.name)
            for name in node.input
            if name in self.tensors and name != other_than
        }
        found = [x for x in map(self.tensors.get, sorted(names)) if x is not None and x.ndim == 3]
        found = [x for x in found if x.shape[::2] == (1, width)]
        if len(found) != 1:
            wanted = f"one position embedding [1, n, {width}] that a {kind} in {scope} reads"
            raise path_error(self.path, wanted, f"{len(found)}", _HINT)
        return found[0]


def dinov2_from_onnx(path: StrPath) -> dict[str, Tensor]:
    """Read a DINOv2's weights: float tensors under the names of timm's ``VisionTransformer``, without a head.

    Raises:
        UsageError: no such file, no ONNX file, a file without a DINOv2, or ``onnx`` is not installed.
    """
    graph = _read(path)
    first = next(filter(None, map(_FIRST_QUERY.fullmatch, graph.nodes)), None)
    if first is None:
        got = "a file without the attention of one"
        raise path_error(path, "a DINOv2 under transformers' names", got, _HINT)
    scope = first[1] or ""
    prefix = scope[1:].replace("/", ".") + "." if scope else ""
    embeddings = f"{prefix}embeddings."
    token = graph.tensor(f"{embeddings}cls_token")
    width = token.shape[-1]
    where = f"{scope}/embeddings"
    parts = [
        graph.constant_of(kind, where, width, f"{embeddings}cls_token")
        for kind in ("Concat", "Reshape")
    ]
    state = {
        "cls_token": token,
        "pos_embed": torch.cat(parts, dim=1),
        "patch_embed.proj.weight": graph.tensor(f"{embeddings}patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": graph.tensor(f"{embeddings}patch_embeddings.projection.bias"),
        "norm.weight": graph.tensor(f"{prefix}layernorm.weight"),
        "norm.bias": graph.tensor(f"{prefix}layernorm.bias"),
    }
    depth = sum(
        re.fullmatch(rf"{re.escape(prefix)}encoder\.layer\.\d+\.norm1\.weight", name) is not None
        for name in graph.tensors
    )
    for i in range(depth):
        state |= _block(
            graph, f"blocks.{i}", f"{prefix}encoder.layer.{i}", f"{scope}/encoder/layer.{i}"
        )
    return state


def _block(graph: _Graph, ours: str, theirs: str, scope: str) -> dict[str, Tensor]:
    qkv = f"{scope}/attention/attention"
    matrices = [graph.matrix(f"{qkv}/{name}/MatMul") for name in _QKV]
    biases = [graph.tensor(f"{theirs}.attention.attention.{name}.bias") for name in _QKV]
    return {
        f"{ours}.attn.qkv.weight": torch.cat(matrices),
        f"{ours}.attn.qkv.bias": torch.cat(biases),
        **{f"{ours}.{mine}": graph.tensor(f"{theirs}.{name}") for mine, name in _VECTORS.items()},
        **{f"{ours}.{mine}": graph.matrix(f"{scope}/{node}") for mine, node in _MATRICES.items()},
    }


def _read(path: StrPath) -> _Graph:
    onnx: Any = require("onnx", extra="onnx")
    data = read_bytes(existing_file(path))
    try:
        graph = onnx.load_model_from_string(data).graph
        tensors = {
            x.name: torch.from_numpy(onnx.numpy_helper.to_array(x).copy())
            for x in graph.initializer
        }
    except (MemoryError, UsageError):
        raise
    except Exception as failure:  # on a foreign file protobuf and NumPy can raise anything
        got = f"one that onnx does not read ({type(failure).__name__})"
        raise path_error(path, "an intact ONNX file", got, _HINT) from None
    floats = {name: x for name, x in tensors.items() if x.is_floating_point()}
    return _Graph(path, floats, {node.name: node for node in graph.node})
