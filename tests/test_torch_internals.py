"""The private parts of PyTorch still mean what ``_torch_internals`` says, and no other module names one."""

import ast
import re
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diversevit_fast import _torch_internals as internals
from diversevit_fast.ops.gelu import gelu_operator
from diversevit_kernels.common import torch_internals as kernels_internals
from tests.test_tree import SOURCES

x = torch.ones(2)
"""What no transform, mode or subclass touches."""


def seen_inside(transform, ask):
    """What ``ask`` says while ``transform`` runs a function."""
    said = []
    transform(lambda y: said.append(ask()) or y.sum())(x)
    return said[-1]


def test_transforms():
    assert not internals.functorch_active()
    assert seen_inside(torch.func.grad, internals.functorch_active)
    assert not internals.in_forward_mode()
    assert seen_inside(lambda f: lambda y: torch.func.jvp(f, (y,), (y,)), internals.in_forward_mode)
    with forward_ad.dual_level():
        assert internals.in_forward_mode()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_who_looks_on():
    assert not internals.dispatch_modes()
    assert internals.tracing_state() is None
    assert not internals.profiler_enabled()
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert internals.dispatch_modes() == 1
    with torch.profiler.profile(acc_events=True):
        assert internals.profiler_enabled()
    mode = torch.overrides.TorchFunctionMode()
    with mode:
        assert internals.function_modes() == [mode]
    assert internals.function_modes() == []
    others = [torch.overrides.TorchFunctionMode() for _ in range(2)]
    with others[0], others[1]:
        internals.insert_function_mode(mode, 1)
        assert internals.function_modes() == [others[0], mode, others[1]]
        for _ in range(2):
            internals.remove_function_mode(mode)
            assert internals.function_modes() == others
    with torch.overrides.BaseTorchFunctionMode() as mode:
        with torch.device("cpu"):
            assert internals.default_device_mode() is None
            assert internals.function_modes()[0] is mode
        torch.set_default_device("cpu")
        assert internals.function_modes()[0] is internals.default_device_mode()
        torch.set_default_device(None)
    trace = partial(torch.jit.trace, example_inputs=x, check_trace=False)
    assert seen_inside(lambda f: lambda _: trace(f), internals.tracing_state) is not None


def test_tensors():
    leaf = torch.ones(2, requires_grad=True)
    assert internals.any_requires_grad(3, None, x, leaf)
    assert not internals.any_requires_grad(3, None, x)

    def keys(x):
        return internals.dispatch_key_set(x).raw_repr()

    assert keys(x) == keys(leaf) == keys(torch.empty(0))
    assert keys(torch.ones(2, dtype=torch.cfloat).conj().imag) & ~keys(x)
    seen = []
    torch.func.vmap(lambda y: seen.append(keys(y)) or y)(x)
    assert seen[0] & ~keys(x)
    y = torch.ones(2)
    before = internals.write_count(y)
    y.add_(1)
    assert internals.write_count(y) == before + 1
    with internals.below_autograd():
        assert not (leaf * 2).requires_grad
        assert torch.is_grad_enabled()


def test_hooks_of_tensors():
    x = torch.ones(2, requires_grad=True) * 1
    assert not internals.is_looked_at(x)
    x.register_hook(lambda g: None)
    assert internals.is_looked_at(x)
    y = torch.ones(2, requires_grad=True) * 1
    y.retain_grad()
    assert internals.is_looked_at(y)


def test_operators():
    operator = gelu_operator
    assert internals.overload_of(operator) is torch.ops.diversevit.gelu.default
    assert internals.name_of(operator) == "gelu"
    torch.testing.assert_close(internals.function_of(operator)(x, "none"), F.gelu(x))
    aten = internals.function_of_aten(torch.ops.aten.gelu.default)
    assert torch.equal(aten(x, approximate="tanh"), F.gelu(x, approximate="tanh"))
    double_backward = torch.library.custom_op(
        "diversevit_test::some",
        lambda x, y, n: x,
        mutates_args=(),
        schema="(Tensor x, Tensor? y, int n) -> Tensor",
    )
    assert internals.tensor_arguments(double_backward) == 2


def test_nodes_of_a_graph():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    leaf = torch.ones(2, 2, requires_grad=True)
    first = Twice.apply(leaf)
    assert isinstance(first.grad_fn, internals.node_class(Twice))
    later = first + 1
    places = [internals.place_in_graph(x.grad_fn) for x in (first, later)]
    assert places[0] < places[1] < internals.LEAF
    ((to_leaf, _),) = first.grad_fn.next_functions
    assert internals.place_in_graph(to_leaf) == internals.LEAF
    operator = gelu_operator(leaf, "none")
    assert operator.grad_fn.name() == internals.operator_node_name(gelu_operator)


@pytest.mark.parametrize("linear", [lambda x, w: F.linear(x, w, w[0]), lambda x, w: F.linear(x, w)])
def test_first_factor_of_a_product(linear):
    x, w = torch.ones(3, 2, requires_grad=True) * 1, torch.ones(2, 2, requires_grad=True)
    node = linear(x, w).grad_fn
    kept = []
    saved, made_by = internals.saved_factor(node)
    assert made_by is x.grad_fn
    saved.register_hooks(lambda t: kept.append(t), lambda _: 5 * x)
    assert torch.equal(kept[0], x)
    assert torch.equal(node(torch.ones(3, 2))[-1].T, torch.full((2, 2), 15.0))
    assert internals.saved_factor((x + 1).grad_fn) is None
    assert internals.saved_factor(linear(x, w.detach()).grad_fn) is None


def test_hooks_of_saved_tensors():
    assert not internals.saved_tensors_hooked()
    with torch.autograd.graph.save_on_cpu():
        assert internals.saved_tensors_hooked()


def test_which_nodes_of_a_backward_pass_run():
    said, passes = [], []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a + b

        @staticmethod
        def backward(ctx, g):
            said.append([internals.will_run(node) for node, _ in ctx.next_functions])
            passes.append(internals.backward_pass())
            return g, g

    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    out = Ask.apply(a * 2, b * 2)
    total = out.sum() + Ask.apply(a * 3, b * 3).sum()
    torch.autograd.grad(total, a, retain_graph=True)
    assert said == [[True, False], [True, False]]
    torch.autograd.grad(out.sum(), a)
    assert passes[0] == passes[1] < passes[2]
    assert internals.backward_pass() == -1


def test_checkpoints():
    said = []

    def fn(y):
        said.append(internals.in_checkpoint())
        return y * y

    leaf = torch.ones(2, requires_grad=True)
    checkpoint(fn, leaf, use_reentrant=False)
    assert said == [True]
    assert not internals.in_checkpoint()
    with torch.autograd.graph.save_on_cpu():
        assert not internals.in_checkpoint()


def test_functions_that_are_differentiable_once():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Once(Twice):
        backward = torch.autograd.function.once_differentiable(Twice.backward)

    x = torch.ones(2, requires_grad=True)
    nodes = [y.grad_fn for y in (Once.apply(x), Twice.apply(x), x.sin())]
    assert [internals.is_differentiable_once(type(node)) for node in nodes] == [True, False, False]


def test_checkpoints_around_checkpoints():
    frames = []

    def inner(y):
        frames.append(internals.checkpoint_frames())
        assert internals.checkpoint_frame() is frames[0][0]
        return y * y

    def outer(y):
        with torch.autograd.graph.save_on_cpu():
            return checkpoint(inner, y, use_reentrant=False)

    checkpoint(outer, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert len(frames[0]) == 2
    assert internals.checkpoint_frames() == []


def test_checkpoints_that_recompute_and_what_is_saved_around_them():
    said, saved = [], []

    def fn(y):
        said.append((internals.in_checkpoint(), internals.in_checkpoint(again=True)))
        with internals.below_saved_tensors_hooks():
            inner = internals.in_checkpoint(), internals.saved_tensors_hooked()
            y = y.sin()
        said.append(inner)
        assert internals.saved_tensors_hooked()
        return y * y

    leaf = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = checkpoint(fn, leaf, use_reentrant=False)
    # the checkpoint's input, and that of the sine; PyTorch 2.10 also saves an empty tensor of its own
    assert sum(x.numel() > 0 for x in saved) == 2
    out.sum().backward()
    assert said == [(True, True), (False, True), (False, True), (False, False)]
    torch.testing.assert_close(leaf.grad, 2 * torch.ones(2).sin() * torch.ones(2).cos())


@pytest.mark.filterwarnings(
    "ignore:Dynamo does not know how to trace:UserWarning"
)  # it breaks the graph
def test_compilers():
    torch._dynamo.reset()
    said = []

    def broken(y):
        said.append(callable(internals.frame_callback()))
        return y * 2

    broken(x)
    torch.compile(broken, backend="eager")(x)
    assert said == [False, True]
    too_many, any_error = internals.compiler_errors()
    assert too_many.__name__ == "FailOnRecompileLimitHit"
    assert issubclass(torch._dynamo.exc.Unsupported, any_error)
    assert not internals.compiler_traces_gradients()
    if torch.__version__ >= "2.11":
        with internals.tracing_gradients():
            assert internals.compiler_traces_gradients()


def test_optimizers_and_scalers():
    for fused in (False, True):
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.5, fused=fused)
        assert internals.steps_with_scaler(optimizer) == fused
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for _ in range(2):  # the second time as if there had been no first
            scaler.scale(weight.sum()).backward()
            scaler.unscale_(optimizer)
            internals.forget_scaled(scaler, optimizer)
            weight.grad = None
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [0.5, 0.5]


def test_modules():
    module = nn.Linear(2, 2)
    assert internals.own_parameters(module)["bias"] is module.bias
    norm = nn.Sequential(nn.BatchNorm1d(2))
    assert internals.own_modules(norm)["0"] is norm[0]
    assert internals.own_buffers(norm[0])["running_mean"] is norm[0].running_mean
    assert not internals.has_hooks(module)
    module.register_forward_pre_hook(lambda *_: None)
    assert internals.has_hooks(module)
    outer = nn.Sequential(nn.ReLU(), nn.Sequential(module))
    outer.register_module("none", None)
    outer[1].register_module("cycle", outer)
    assert internals.has_hooks_inside(outer)
    assert not internals.has_hooks_inside(outer, [module])
    assert not internals.has_hooks_inside(module)
    assert not internals.has_global_hooks()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert internals.has_global_hooks()
    handle.remove()
    assert not internals.is_compiled(module)
    assert internals.is_compiled(torch.compile(module))
    module.compile()
    assert internals.is_compiled(module)
    norms = (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2))
    assert all(isinstance(norm, internals.BatchNorm) for norm in norms)
    assert not isinstance(nn.LayerNorm(2), internals.BatchNorm)
    assert internals.running_ddp() is None
    assert internals.fsdp_modules(module) == []
    q = torch.ones(1, 1, 2, 2)
    assert internals.cpu_flash_attention.default(q, q, q)[0].shape == q.shape
    assert isinstance(kernels_internals.has_bfloat16_instructions(), bool)


HERE = {
    "diversevit_fast._torch_internals",
    "diversevit_fast.cost.torch_internals",
    "diversevit_kernels.common.torch_internals",
}
OF_OTHERS = {
    *("_asdict", "_fields", "_make", "_replace"),  # public, of named tuples
    "_attn_implementation",  # transformers'
    "_fast_norm",  # timm's
    *("_bias", "_create_block_mask"),  # xformers'
}
NOT_ON_OTHERS = {"_buffers", "_modules", "_name", "_parameters", "_version"}
"""What PyTorch's objects have, whatever ours call their own."""

TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def is_private(name):
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


def names_defined(tree):
    """Of functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


OURS = {name for module in TREES.keys() - HERE for name in names_defined(TREES[module])}


def names_of_others(tree):
    """The private names in a module that none of ours defines, and PyTorch's experimental modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [alias.name for alias in node.names]
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if not getattr(node, "level", 0):
                yield from (
                    n for name in (module, *names) for n in name.split(".") if is_private(n)
                )
                yield from (n for n in (module, *names) if n.startswith("torch.fx.experimental"))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}
            if node.attr not in OURS or (node.attr in NOT_ON_OTHERS and not own):
                yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            said = node.args[1] if node.func.id in {"getattr", "hasattr"} else None
            if isinstance(said, ast.Constant) and is_private(said.value) and said.value not in OURS:
                yield said.value


@pytest.mark.parametrize("module", [name for name in TREES if name not in HERE])
def test_no_other_module_names_a_private_part(module):
    assert not set(names_of_others(TREES[module])) - OF_OTHERS


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._any_requires_grad(x)",
        "import torch._dynamo",
        "from torch._dynamo import config",
        "from torch.utils import _pytree",
        "from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode",
        "operator._opoverload",
        "x._version",
        "getattr(module, '_parametrizations')",
    ],
)
def test_it_would_be_seen(line):
    assert set(names_of_others(ast.parse(line)))


def test_tensors_like_others():
    x, y = torch.ones(2, 3), torch.ones(3, 2).T
    alike = kernels_internals.likeness([x, y])
    assert alike(x.clone(), torch.zeros(3, 2).T)
    others = [x[:1], x.double(), torch.ones(3, 2).T, x.clone().requires_grad_(), None]
    others += [torch.nn.Parameter(x, False), torch._neg_view(x), torch.ones(2, 3, device="meta"), y]
    assert not any(alike(other, y) for other in others)
    assert not alike(y, x)
    with torch.autocast("cpu"):
        assert not alike(x.clone(), y)
    kept = weakref.ref(x)
    del x, others
    assert kept() is None
