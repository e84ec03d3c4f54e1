"""The tree tells the story: imports point one way, optional packages stay optional, nothing shadows."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEAVES = {"_torch_internals", "errors", "files", "installation", "version"}
"""Modules at the root that anything may import; ``files`` imports ``errors``, and that ``installation``."""

# folder or module of diversevit_fast -> those it may import from, besides itself and the leaves
ALLOWED = {
    "_torch_internals": set(),
    "errors": set(),
    "testing": set(),
    "version": set(),
    "files": set(),
    "installation": set(),
    "weight_files": set(),
    "ops": set(),
    "attachment": {"ops"},
    "integrations": {"attachment", "ops"},
    "penalty": {"attachment", "ops"},
    "training": {"attachment", "penalty"},
    "cost": {"attachment", "ops", "penalty"},
    "nn": {"ops", "penalty"},
    "heads": {"attachment", "ops", "weight_files"},
    "probes": {"attachment", "heads", "ops"},
    "models": {"attachment", "heads", "nn", "weight_files"},
    "data": set(),
    "experiment": {
        "attachment",
        "cost",
        "data",
        "heads",
        "models",
        "ops",
        "penalty",
        "probes",
        "training",
    }
    | {"weight_files"},
}


def layer_of(module: str) -> str:
    """The folder, or module at the root, that a module of ours belongs to."""
    package, _, rest = module.partition(".")
    return package if package == "diversevit_kernels" else rest.partition(".")[0]


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
    below = {layer} if layer == "diversevit_kernels" else {layer, *LEAVES, *ALLOWED[layer]}
    if layer in ("ops", "cost"):
        below.add("diversevit_kernels")
    for name in imports(SOURCES[module], module):
        if name.startswith(("diversevit_fast", "diversevit_kernels")):
            assert layer_of(name) in below, f"{module} imports {name}"


def folder_of(module: str) -> str:
    """``diversevit_kernels.triton.attention`` of ``diversevit_kernels.triton.attention.forward``."""
    return ".".join(module.split(".")[:3])


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("diversevit_kernels.")])
def test_kernels_of_an_operator_stand_on_the_runtime(module):
    """A backend's operator imports its runtime, ``common`` and nothing of another backend."""
    _, backend, *rest = module.split(".")
    own = f"diversevit_kernels.{backend}"
    for name in imports(SOURCES[module], module):
        if not name.startswith("diversevit_kernels"):
            continue
        if backend == "common" or rest[:1] == ["runtime"]:
            allowed = {folder_of(module), "diversevit_kernels.common"}
        else:
            allowed = {folder_of(module), f"{own}.runtime", *BORROWS.get(folder_of(module), ())}
        assert any(
            folder_of(name).startswith(one) for one in {*allowed, "diversevit_kernels.common"}
        ), f"{module} imports {name}"


BORROWS = {
    "diversevit_kernels.cpu.warmup": ("diversevit_kernels.cpu.attention",),
}
"""What an operator takes from another's folder."""


# folder of the repository -> what it may import of ``benchmarks``, ``tests`` and ``tools``
OUTSIDE = {
    "diversevit_fast": (),
    "kernels": (),
    "examples": (),
    "benchmarks": ("benchmarks",),
    "tools/interpreter": ("tools.interpreter",),
    "tools/kernel_analysis": ("benchmarks", "tools.interpreter", "tools.kernel_analysis"),
    "tools/docs": ("tools.docs", "tools.pilot"),
    "tools/pilot": ("tools.pilot",),
    "tests": ("tests",),
    "tests/benchmarks": ("benchmarks", "tests"),
    "tests/docs": ("benchmarks", "tests", "tools"),
    "tests/kernels/triton": ("tests", "tools.interpreter"),
    "tests/tools": ("benchmarks", "tests", "tools"),
}


def forbidden(path: Path, root: Path = ROOT) -> list[str]:
    """What a file imports of ``benchmarks``, ``tests`` and ``tools`` that ``OUTSIDE`` does not allow its folder."""
    here = path.relative_to(root)
    folder = next(str(one) for one in here.parents if str(one) in OUTSIDE)
    allowed = tuple(f"{name}." for name in OUTSIDE[folder])
    names = imports(path, ".".join(here.with_suffix("").parts).removesuffix(".__init__"))
    ours = [n for n in names if n.partition(".")[0] in ("benchmarks", "tests", "tools")]
    return [name for name in ours if not f"{name}.".startswith(allowed)]


@pytest.mark.parametrize("folder", OUTSIDE)
def test_tests_and_benchmarks_do_not_import_each_other(folder):
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    assert not {str(path): found for path in paths if (found := forbidden(path))}


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("benchmarks/steps.py", "from tests.helpers.vits import step", ["tests.helpers.vits"]),
        ("benchmarks/steps.py", "from .timing import summary", []),
        ("tests/ops/test_gelu.py", "import benchmarks.timing", ["benchmarks.timing"]),
        ("tests/kernels/triton/test_gelu.py", "from tools.interpreter import traffic", []),
        ("tests/kernels/triton/test_gelu.py", "from tools import docs", ["tools"]),
        ("tests/docs/test_readme.py", "from tools.docs import pipeline", []),
    ],
)
def test_a_forbidden_import_is_seen(path, line, found, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line)
    assert forbidden(tmp_path / path, tmp_path) == found


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
