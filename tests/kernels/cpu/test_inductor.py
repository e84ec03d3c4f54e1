"""Compiled formulas of attention's tiles: within budget, and never a crash where nothing can compile."""

import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_kernels.cpu.attention import blocked, formulas
from diversevit_kernels.cpu.attention import dispatch as attention
from diversevit_kernels.cpu.attention import native as attention_native
from diversevit_kernels.cpu.runtime import cache_folder, inductor, library_cache
from tests.helpers.attention_cases import CASES, check_orders
from tests.helpers.processes import in_a_process


@pytest.fixture(scope="module", autouse=True)
def one_folder(tmp_path_factory: pytest.TempPathFactory):
    """Compile into a folder of the session, from which a second worker reads what the first has written."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp().parent / "inductor"
        patch.setenv("DIVERSEVIT_CACHE_DIR", str(folder))
        yield


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch):
    """Small tensors are compiled for too; the calls of a compiled formula are listed."""
    calls, compiled = [], inductor.compiled

    def counted(formula, dtype):
        calls.append(formula.name)
        return compiled(formula, dtype)

    monkeypatch.setattr(inductor, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(attention_native, "library", lambda name: None)
    monkeypatch.setattr(inductor, "compiled", counted)
    return calls


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile_bytes", [1 << 20, 1 << 10], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("name", CASES)
def test_attention(always, monkeypatch, name, tile_bytes, dtype) -> None:
    monkeypatch.setattr(blocked, "TILE_BYTES", tile_bytes)
    check_orders(attention, CASES[name], dtype)
    assert set(always) >= {"attention_forward", "attention_backward", "attention_double_backward"}


def test_attention_of_absent_cotangents_takes_the_other_path(always) -> None:
    q, k, v = (numbers(2, 2, 9, 8, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(3))
    (dq,) = torch.autograd.grad(dvf.attention(q, k, v).square().sum(), q, create_graph=True)
    always.clear()
    torch.autograd.grad(dq.square().sum(), (q, k, v))
    assert "attention_double_backward" not in always


def test_it_is_compiled_under_function_and_dispatch_modes(always) -> None:
    from torch.overrides import BaseTorchFunctionMode
    from torch.utils._python_dispatch import BaseTorchDispatchMode

    q, k, v = (numbers(1, 2, 9, 8, dtype=torch.float32, seed=i) for i in range(3))
    plain = dvf.attention(q, k, v)
    inductor._loaded.clear()
    with BaseTorchFunctionMode(), BaseTorchDispatchMode():
        inside = dvf.attention(q, k, v)
    assert len(always) == 2
    assert torch.equal(plain, inside)


CALL = """
import warnings, torch
from diversevit_kernels.cpu.attention import formulas
from diversevit_kernels.cpu.runtime import inductor
s = torch.linspace(-4, 4, 1 << 18).view(1, 512, 512)
q = k = torch.empty(1, 1, 512, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        run = formulas.fused(formulas.FORWARD, q, k)
        p, softmax = formulas.forward(run, s.clone())
known = [str(w.message) for w in caught if "diversevit" in str(w.message)]
print(len(known), run is not None, float(softmax.sum()), *known)
"""

LOADED = """
for line in open("/proc/self/maps"):
    print(line, end="")
"""


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "/nowhere/compiler"}, {"DIVERSEVIT_CACHE_DIR": "/dev/null/folder"}],
    ids=("no compiler", "no folder"),
)
def test_without_a_compiler_there_is_one_warning(environment, tmp_path) -> None:
    here = {"DIVERSEVIT_CACHE_DIR": str(tmp_path / "kept"), **environment}
    out, err = in_a_process(CALL, **here).communicate()
    count, made, _, *words = out.split()
    assert (count, made) == ("1", "False"), out + err
    assert "could not be compiled" in " ".join(words)


def test_switched_off(monkeypatch) -> None:
    monkeypatch.setenv("DIVERSEVIT_COMPILE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inductor.compiled(formulas.FORWARD, torch.float32) is None
        assert dvf.warmup(torch.float32) == {torch.float32: []}


def test_two_processes_compile_at_once(tmp_path) -> None:
    """With a compiler of two words."""
    here = {"DIVERSEVIT_CACHE_DIR": str(tmp_path / "kept"), "CXX": f"env {shutil.which('g++')}"}
    both = [in_a_process(CALL, **here) for _ in range(2)]
    for one in both:
        out, err = one.communicate()
        assert out.split()[:2] == ["0", "True"], out + err
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.fixture
def kept(tmp_path, monkeypatch) -> tuple[Path, list[Path]]:
    """The file of a formula in a folder of the test's own, and the folders it was compiled in again."""
    formula = inductor.compiled(formulas.FORWARD, torch.float32)
    assert formula is not None
    name = inductor.file_of(formulas.FORWARD, torch.float32)
    content = (cache_folder.folder() / name).read_bytes()
    monkeypatch.setenv("DIVERSEVIT_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(inductor, "_loaded", {})
    again: list[Path] = []

    def build(formula, dtype, command, file, folder):
        again.append(folder)
        (folder / file).write_bytes(content[: -library_cache._DIGEST_BYTES])
        return folder / file

    monkeypatch.setattr(inductor, "_build_in_new_process", build)
    file = cache_folder.folder() / name
    file.write_bytes(content)
    file.chmod(0o600)
    return file, again


def is_right() -> bool:
    run = inductor.compiled(formulas.FORWARD, torch.float32)
    s = numbers(6, 40, dtype=torch.float32, seed=0)
    assert run is not None
    torch.testing.assert_close(run(s), formulas._forward(s))
    return True


def test_a_kept_formula_is_loaded(kept) -> None:
    assert is_right()
    assert kept[1] == []


@pytest.mark.parametrize("length", [0, 100, 100_000])
def test_a_formula_cut_short_is_compiled_again(kept, length) -> None:
    file, again = kept
    os.truncate(file, length)
    assert is_right()
    assert len(again) == 1
    inductor._loaded.clear()
    assert is_right()
    assert len(again) == 1


def test_a_formula_that_is_none_is_compiled_again(kept) -> None:
    """Whole, but of no use to this PyTorch."""
    file, again = kept
    library = (Path(torch.__file__).parent / "lib/libshm.so").read_bytes()
    file.write_bytes(library + library_cache._digest(file.name, library))
    assert is_right()
    assert len(again) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_nothing_is_loaded_from_where_others_write(tmp_path) -> None:
    for _ in range(2):  # compiled, then found
        here = {"DIVERSEVIT_CACHE_DIR": str(tmp_path / "kept")}
        out, err = in_a_process(CALL + LOADED, **here).communicate()
        assert "memfd:diversevit" in out, err
        assert "aotinductor_" not in out
        assert "torchinductor_" not in out


def test_warmup_names_what_it_compiled() -> None:
    assert set(dvf.warmup(torch.float32)[torch.float32]) == {
        *("attention", "gelu", "layer_norm", "routed_head_penalty"),
        *(f"attention_{order}" for order in ("forward", "backward", "double_backward")),
    }


def test_warmup_refuses_what_is_not_compiled() -> None:
    with pytest.raises(UsageError, match="warmup: expected one of"):
        dvf.warmup(torch.float64)
