"""The tree tells the story: imports point one way, optional packages stay optional, nothing shadows."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# layer -> the layers it may import from, besides itself and third parties
ALLOWED = {
    "diversevit_kernels": set(),
    "diversevit_fast.errors": set(),
    "diversevit_fast.version": set(),
    "diversevit_fast.terminal": set(),
    "diversevit_fast.files": {"errors"},
    "diversevit_fast.reference": set(),
    "diversevit_fast.backends": {"errors"},
    "diversevit_fast.warmup": {"backends", "errors"},
    "diversevit_fast.ops": {"backends", "errors", "reference"},
    "diversevit_fast.head_gradients": {"errors", "ops"},
    "diversevit_fast.nn": {"errors", "head_gradients", "ops"},
    "diversevit_fast.indices": set(),
    "diversevit_fast.swap": set(),
    "diversevit_fast.attention_modules": {"errors", "indices"},
    "diversevit_fast.unfused": {"attention_modules", "errors"},
    "diversevit_fast.multi_head": {"errors", "ops", "unfused"},
    "diversevit_fast.support": {"attention_modules", "errors"},
    "diversevit_fast.self_attention": {"attention_modules", "errors", "head_gradients"},
    "diversevit_fast.parallel": {"errors"},
    "diversevit_fast.inner_scale": {"errors"},
    "diversevit_fast.graph": {"errors"},
    "diversevit_fast.batches": {"attention_modules", "errors"},
    "diversevit_fast.attach": {"attention_modules", "errors", "multi_head", "ops", "unfused"},
    "diversevit_fast.capture": {
        *("attach", "attention_modules", "errors", "indices", "parallel", "support"),
    },
    "diversevit_fast.class_token": {"attention_modules", "unfused"},
    "diversevit_fast.sampling": {"errors"},
    "diversevit_fast.diversity": {
        *(
            "attach",
            "attention_modules",
            "batches",
            "class_token",
            "errors",
            "head_gradients",
            "ops",
        ),
        *(
            "graph",
            "indices",
            "inner_scale",
            "multi_head",
            "parallel",
            "sampling",
            "self_attention",
            "support",
            "unfused",
        ),
    },
    "diversevit_fast.integrations": {"errors", "ops", "backends", "unfused"},
    "diversevit_fast.compile_loss": {"attach", "errors", "ops"},
    "diversevit_fast.pruning": {
        *("attach", "attention_modules", "errors", "indices", "parallel", "support", "swap"),
    },
    "diversevit_fast.weight_files": {"errors", "files"},
    "diversevit_fast.replay": {
        *("attach", "attention_modules", "errors", "pruning", "support", "unfused"),
    },
    "diversevit_fast.pruned_files": {
        *("attention_modules", "errors", "indices", "ops", "parallel", "pruning", "version"),
        "weight_files",
    },
    "diversevit_fast.selection": {
        *("attention_modules", "batches", "errors", "indices", "ops", "parallel", "replay"),
    },
    "diversevit_fast.models": {"errors", "files", "nn", "ops", "pruning", "weight_files"},
    "diversevit_fast.data": {"errors", "files"},
    "diversevit_fast.doctor": {"backends", "errors", "ops", "reference", "version"},
    "diversevit_fast.experiment": {
        *("data", "diversity", "errors", "models", "pruning", "selection", "version", "backends"),
        *("doctor", "ops", "capture", "attach", "files", "terminal"),
    },
    "diversevit_fast.cli": {"errors", "experiment", "doctor", "data", "version", "terminal"},
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "diversevit_kernels" else ".".join(parts[:2])


def imports(path: Path, module: str):
    """Our own modules that a file imports, anywhere in it, as absolute names."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                name = ".".join([*base, name] if name else base)
            if name == "diversevit_fast":
                yield from (f"{name}.{alias.name}" for alias in node.names)
            else:
                yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


SOURCES = {
    ".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p
    for root, folder in ((ROOT, "diversevit_fast"), (ROOT / "kernels", "diversevit_kernels"))
    for p in sorted((root / folder).rglob("*.py"))
}


@pytest.mark.parametrize("module", [m for m in SOURCES if m != "diversevit_fast"])
def test_arrows_point_one_way(module):
    layer = layer_of(module)
    allowed = {layer, *(f"diversevit_fast.{name}" for name in ALLOWED[layer])}
    for name in imports(SOURCES[module], module):
        if name.startswith(("diversevit_fast", "diversevit_kernels")):
            assert layer_of(name) in allowed, f"{module} imports {name}"


def test_files_are_small():
    long = {m: len(p.read_text().splitlines()) for m, p in SOURCES.items()}
    assert not {m: n for m, n in long.items() if n > 450}


def test_the_kernels_folder_shadows_nobody():
    assert not (ROOT / "kernels/__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    origins = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    ours = (ROOT / "kernels").resolve()
    in_tree = (
        Path.cwd().resolve() == ROOT.resolve()
    )  # then a namespace package of that name is seen
    assert in_tree or all(o is None or ours not in Path(o).resolve().parents for o in origins)


BLOCKED = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import torch
import diversevit_fast as dvf
q = torch.randn(1, 2, 5, 4, requires_grad=True)
(g,) = torch.autograd.grad(dvf.attention(q, q, q).sum(), q, create_graph=True)
g.square().sum().backward()
attn = dvf.nn.MultiHeadAttention(8, 2)
print(attn(torch.randn(1, 3, 8)).shape, q.grad.abs().sum() > 0)
"""


@pytest.mark.parametrize(
    "blocked",
    [("triton",), ("timm", "torchvision", "sklearn", "typer", "rich", "matplotlib")],
    ids=str,
)
def test_works_on_a_cpu_without(blocked):
    code = BLOCKED.format(blocked=blocked)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "tensor(True)" in run.stdout


def test_a_missing_extra_is_one_line():
    code = (
        BLOCKED.format(blocked=("sklearn",)) + "\nfrom diversevit_fast.data import DigitsPhotos\n"
    )
    code += "try:\n    DigitsPhotos()\nexcept dvf.UsageError as e:\n    print('said:', e)\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "said: sklearn: expected an installed package" in run.stdout, run.stderr
