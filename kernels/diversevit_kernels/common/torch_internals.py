"""The private parts of PyTorch that the kernels use; nothing else in this package names one.

Tried on PyTorch 2.10.0 and 2.14.1 by ``tests/test_torch_internals.py`` and ``tests/kernels/cpu/test_inductor.py``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["TorchDispatchMode", "tree_flatten", "tree_unflatten"]
"""As they are; every user of dispatch modes imports them from here."""

without_modes = _disable_current_modes
"""A context in which no dispatch mode is entered, not even that of fake tensors. Publicly each is left in its turn."""


def has_bfloat16_instructions() -> bool:
    """Whether the CPU multiplies bfloat16 itself (AVX-512).

    Before 2.11 PyTorch has no public list of what a processor can do.
    """
    return torch.cpu._is_avx512_bf16_supported()


def compile_into_package(program: torch.export.ExportedProgram, path: str, **options: Any) -> None:
    """Compile an exported program by Inductor into the package at ``path``.

    PyTorch's documentation gives this as the way, and has no public name for it.
    """
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)


def runner_of(library: str) -> Any:
    """What runs such a package's library, by ``run(operands)``.

    ``torch._inductor.aoti_load_package``, private as well, wants the whole package and unpacks it by itself.
    """
    return torch._C._aoti.AOTIModelContainerRunnerCpu(library, 1)  # pyright: ignore


def stream_lookup() -> Any:
    """The function from a CUDA device's index to the number of its current stream.

    ``torch.cuda.current_stream`` makes an object first, which takes ten times as long.
    """
    return torch._C._cuda_getCurrentRawStream


def likeness(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that tells of so many tensors whether they are different ones and like these, in one call of C.

    It compares types, dispatch keys, dtypes, devices, sizes, strides, and whether a gradient is required, as
    ``torch.compile`` does before it runs what it compiled. It keeps none of the tensors.
    """
    shapes, strides = ([list(x.shape) for x in tensors], [list(x.stride()) for x in tensors])
    return torch._C._dynamo.guards.TensorGuards(  # pyright: ignore
        *tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides
    ).check
