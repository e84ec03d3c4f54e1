"""Shared fixtures. Tests run on the CPU with one thread per worker, seeded by their own generators."""

import platform
import shutil

import pytest
import torch

from diversevit_kernels.cpu.runtime import compiler, cpp_library

PROCESSORS = {
    "128-bit vectors": ("-march=x86-64-v2",),
    "256-bit vectors": ("-march=x86-64-v3",),
    "no matrix unit": ("-march=native", "-mno-amx-bf16"),
    "no instruction for bfloat16": ("-march=native", "-mno-amx-bf16", "-mno-avx512bf16"),
}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=PROCESSORS.values(), ids=PROCESSORS)
def lesser_processor(request, monkeypatch):
    """``cpp_library.library`` of a C++ kernel compiled without some of the instructions that this processor has."""
    if platform.machine() != "x86_64" or shutil.which(compiler.command()[0]) is None:
        pytest.skip("needs x86 and a C++ compiler")
    if "v3" in request.param[0] and not torch.cpu._is_avx2_supported():
        pytest.skip("needs 256-bit vectors")
    monkeypatch.setattr(cpp_library, "_PROCESSOR_FLAGS", (request.param,))
    monkeypatch.setattr(cpp_library, "_loaded", {})
    return cpp_library.library


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rows of the tables in docs/systems.md go into the report (``--junitxml``) with their tests' outcomes."""
    for item in items:
        for mark in item.iter_markers("system"):
            item.user_properties.append(("system", "\t".join(mark.args)))
