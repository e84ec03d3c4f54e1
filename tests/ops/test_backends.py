"""Every backend has the functions of every operator's protocol, and the schemas are those of the named tuples."""

import inspect
from importlib import import_module

import pytest
import torch

from diversevit_fast.ops import backends
from diversevit_fast.ops.backends import _BACKENDS, _FOLDERS


def functions_of(protocol):
    return {n: f for n, f in vars(protocol).items() if inspect.isfunction(f) and n[0] != "_"}


@pytest.mark.parametrize("protocol", _FOLDERS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("backend", _BACKENDS)
def test_every_backend_implements_the_protocol(backend, protocol):
    if backend == "triton":
        pytest.importorskip("triton")
    module = import_module(_BACKENDS[backend].module.format(operator=_FOLDERS[protocol]))
    assert len(functions_of(protocol)) >= 3
    for name, declared in functions_of(protocol).items():
        _, *wanted = inspect.signature(declared).parameters.values()
        found = inspect.signature(getattr(module, name)).parameters.values()
        assert [(p.name, p.annotation) for p in found] == [(p.name, p.annotation) for p in wanted]


@pytest.mark.parametrize("protocol", _FOLDERS, ids=lambda x: x.__name__)
def test_schemas_have_the_fields_of_the_named_tuples(protocol):
    for name, declared in functions_of(protocol).items():
        if not name.endswith("backward"):
            continue
        inputs = list(inspect.signature(declared).parameters.values())[1].annotation
        schema = getattr(torch.ops.diversevit, name).default._schema
        assert [argument.name for argument in schema.arguments] == list(inputs._fields)
        optional = [
            argument.name for argument in schema.arguments if "Optional" in str(argument.type)
        ]
        assert optional == [
            n for n, t in inputs.__annotations__.items() if type(None) in getattr(t, "__args__", ())
        ]


def test_kernels_are_looked_up_once_per_device(monkeypatch):
    looked = []
    monkeypatch.setattr(backends, "import_module", lambda name: looked.append(name) or object())
    backends._kernels.cache_clear()
    try:
        protocol = next(iter(_FOLDERS))
        one, two = (backends.kernels(protocol, torch.empty(1)) for _ in range(2))
        assert one is two
        assert looked == ["diversevit_kernels.cpu.attention"]
    finally:
        monkeypatch.undo()
        backends._kernels.cache_clear()
