"""Triton compares every global value that a kernel reads at every launch, for microseconds: kernels read none."""

import dis
import importlib
import pkgutil
from types import ModuleType, SimpleNamespace

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from diversevit_kernels import triton as kernels  # noqa: E402

JITTED = (JITFunction, InterpretedFunction)
HALF = tl.constexpr(0.5)


def jitted(module):
    """The functions of a module that Triton compiles."""
    of_it = (f for f in vars(module).values() if isinstance(f, JITTED))
    return {f.fn.__name__: f.fn for f in of_it if f.fn.__module__ == module.__name__}


def global_values(function):
    """Names of the globals that a function reads which are values: no modules, functions or classes."""
    for instruction in dis.get_instructions(function):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            value = function.__globals__.get(instruction.argval)
            plain = isinstance(value, tl.constexpr) or not callable(value)
            if value is not None and plain and not isinstance(value, ModuleType):
                yield instruction.argval


MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
]
FUNCTIONS = {
    f"{module.__name__.removeprefix(kernels.__name__)}.{name}": function
    for module in MODULES
    for name, function in jitted(module).items()
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_kernel_reads_a_global_value(name):
    assert not set(global_values(FUNCTIONS[name]))


def test_every_folder_has_kernels():
    folders = {name.split(".")[1] for name in FUNCTIONS}
    assert folders == {"attention", "gelu", "head_penalty", "layer_norm", "runtime"}
    assert len(FUNCTIONS) > 80


@triton.jit
def halves(x):
    return x * HALF


@triton.jit
def sums(x):
    return tl.sum(jitted_halves(x), 0)


jitted_halves = halves


def test_a_global_value_is_found():
    assert list(global_values(halves.fn)) == ["HALF"]
    assert not list(global_values(sums.fn))
    assert jitted(SimpleNamespace(f=halves, __name__=__name__)) == {"halves": halves.fn}
