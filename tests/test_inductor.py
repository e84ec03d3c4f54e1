"""Compiled formulas of the CPU backend: within budget, and never a crash where nothing can compile."""

import warnings

import pytest
import torch
from attention_cases import CASES, check_rungs
from oracles import assert_within_budget
from processes import in_a_process
from torch import Tensor

import diversevit_fast as dvf
from diversevit_fast import reference
from diversevit_fast.errors import UsageError
from diversevit_kernels.cpu import attention, attention_native, gelu, inductor

SHAPES = {"odd": (7, 37), "wide": (2, 5000), "tall": (3001, 2), "three axes": (3, 33, 65)}


@pytest.fixture(scope="module", autouse=True)
def one_folder(tmp_path_factory: pytest.TempPathFactory):
    """Compile into a folder of the session, from which a second worker reads what the first has written."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp().parent / "inductor"
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        yield


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch):
    """Small tensors are compiled for too; the calls of a compiled formula are listed."""
    calls, compiled = [], inductor.compiled

    def counted(formula, dtype):
        calls.append(formula.name)
        return compiled(formula, dtype)

    monkeypatch.setattr(inductor, "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(attention_native, "library", lambda name: None)
    monkeypatch.setattr(inductor, "compiled", counted)
    return calls


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ladder(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the inputs and of dy under random cotangents of the first gradients."""
    dy = numbers(*y.shape, dtype=y.dtype, seed=7).requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    cotangents = [numbers(*g.shape, dtype=g.dtype, seed=8 + i) for i, g in enumerate(first)]
    wanted = [*inputs, dy]
    found = torch.autograd.grad(first, wanted, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def layer_norm_inputs(shape, dtype, parameters):
    x = numbers(*shape, dtype=dtype, seed=0) * 3 + 1
    row = [numbers(shape[-1], dtype=dtype, seed=1 + i) for i in range(2)] if parameters else []
    return [t.requires_grad_() for t in (x, *row)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("parameters", [True, False])
def test_layer_norm(always, shape, dtype, parameters) -> None:
    def run(function, kind):
        inputs = [
            t.detach().to(kind).requires_grad_()
            for t in layer_norm_inputs(shape, dtype, parameters)
        ]
        return ladder(function(inputs[0], shape[-1:], *inputs[1:]), inputs)

    ours = run(dvf.layer_norm, dtype)
    first = ["rows", "columns"][: 1 + parameters] if dtype != torch.float32 else []
    second = ["rows", "columns"][: 1 + parameters]
    names = [f"layer_norm_backward_{part}" for part in first]
    assert always == names + [f"layer_norm_double_backward_{part}" for part in second]
    eager = run(torch.nn.functional.layer_norm, dtype)
    exact = run(reference_layer_norm, torch.float64)
    terms = max(shape[-1], ours[0].numel() // shape[-1])
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_within_budget(a, b, c, terms=terms)


def reference_layer_norm(x, normalized, weight=None, bias=None):
    return reference.layer_norm(x, normalized, weight, bias, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gelu(always, shape, approximate, dtype) -> None:
    x = numbers(*shape, dtype=dtype, seed=0) * 3

    def run(function, kind):
        one = x.to(kind).requires_grad_()
        return ladder(function(one, approximate=approximate), [one])

    ours = run(dvf.gelu, dtype)
    assert len(always) == 1
    eager, exact = run(torch.nn.functional.gelu, dtype), run(reference.gelu, torch.float64)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert_within_budget(a, b, c, terms=1)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_finite_at_the_ends(always, approximate) -> None:
    x = torch.tensor([0.0, 12, -12, 41, -41, 3e30, -3e30, float("inf"), -float("inf")])
    gx, gdy = gelu.gelu_double_backward(x, torch.ones(9), torch.full((9,), 2.0), approximate)
    assert always
    torch.testing.assert_close(gx[3:], torch.zeros(6))
    torch.testing.assert_close(gdy, torch.tensor([1.0, 2, 0, 2, 0, 2, 0, 2, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile_bytes", [1 << 20, 1 << 10], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("name", CASES)
def test_attention(always, monkeypatch, name, tile_bytes, dtype) -> None:
    monkeypatch.setattr(attention, "TILE_BYTES", tile_bytes)
    check_rungs(attention, CASES[name], dtype)
    assert set(always) >= {"attention_forward", "attention_backward", "attention_double_backward"}


def test_attention_of_absent_cotangents_takes_the_other_path(always) -> None:
    q, k, v = (numbers(2, 2, 9, 8, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(3))
    (dq,) = torch.autograd.grad(dvf.attention(q, k, v).square().sum(), q, create_graph=True)
    always.clear()
    torch.autograd.grad(dq.square().sum(), (q, k, v))
    assert "attention_double_backward" not in always


def test_strided_operands(always) -> None:
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    dense = x.contiguous()
    w = torch.randn(16)[::2]
    for one in (x, dense):
        one.requires_grad_()
    found = [ladder(dvf.layer_norm(one, (8,), w), [one])[0] for one in (x, dense)]
    torch.testing.assert_close(*found)
    found = [ladder(dvf.gelu(one), [one])[0] for one in (x, dense)]
    torch.testing.assert_close(*found)
    assert len(always) == 4


def test_same_bits_twice(always) -> None:
    inputs = layer_norm_inputs((64, 130), torch.float32, True)
    runs = [ladder(dvf.layer_norm(inputs[0], (130,), *inputs[1:]), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert always


def test_one_row_takes_the_other_path(always) -> None:
    inputs = layer_norm_inputs((1, 130), torch.float32, True)
    ladder(dvf.layer_norm(inputs[0], (130,), *inputs[1:]), inputs)
    assert not always


def test_it_is_compiled_under_function_and_dispatch_modes(always) -> None:
    from torch.overrides import BaseTorchFunctionMode
    from torch.utils._python_dispatch import BaseTorchDispatchMode

    x = numbers(9, 11, dtype=torch.float32, seed=0).requires_grad_()
    plain = ladder(dvf.gelu(x), [x])
    inductor._loaded.clear()
    with BaseTorchFunctionMode(), BaseTorchDispatchMode():
        inside = ladder(dvf.gelu(x), [x])
    assert len(always) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


CALL = """
import warnings, torch
from diversevit_kernels.cpu import gelu, inductor
x, dy, a = torch.linspace(-4, 4, 1 << 18).repeat(3, 1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        gx, gdy = gelu.gelu_double_backward(x, dy, a, "none")
known = [str(w.message) for w in caught if "diversevit" in str(w.message)]
print(len(known), inductor.compiled(gelu.DOUBLE_BACKWARD["none"], x.dtype) is not None, float(gx.sum()), *known)
"""


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "/nowhere/compiler"}, {"TORCHINDUCTOR_CACHE_DIR": "/dev/null/folder"}],
    ids=("no compiler", "no folder"),
)
def test_without_a_compiler_there_is_one_warning(environment, tmp_path) -> None:
    here = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **environment}
    out, err = in_a_process(CALL, **here).communicate()
    count, made, _, *words = out.split()
    assert (count, made) == ("1", "False"), out + err
    assert "could not be compiled" in " ".join(words)


def test_switched_off(monkeypatch) -> None:
    monkeypatch.setenv("DIVERSEVIT_COMPILE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inductor.compiled(gelu.DOUBLE_BACKWARD["none"], torch.float32) is None
        assert dvf.warmup(torch.float32) == {torch.float32: []}


def test_two_processes_compile_at_once(tmp_path) -> None:
    both = [in_a_process(CALL, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    for one in both:
        out, err = one.communicate()
        assert out.split()[:2] == ["0", "True"], out + err
    assert len(list((tmp_path / "diversevit").iterdir())) == 1


def test_warmup_names_what_it_compiled() -> None:
    assert set(dvf.warmup(torch.float32)[torch.float32]) == {
        "attention",
        *(f"attention_{rung}" for rung in ("forward", "backward", "double_backward")),
        *(f"layer_norm_double_backward_{part}" for part in ("rows", "columns")),
        *("gelu_double_backward", "gelu_tanh_double_backward"),
    }


def test_warmup_refuses_what_is_not_compiled() -> None:
    with pytest.raises(UsageError, match="warmup: expected one of"):
        dvf.warmup(torch.float64)
