"""The private parts of PyTorch that counting a step on tensors without memory needs.

As in ``diversevit_fast._torch_internals`` each says what it tells and why no public call does. They were tried on
PyTorch 2.10.0 and 2.14.1 by ``tests/cost/test_torch_internals.py``.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["FakeTensorMode"]  # here as it is

flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention
"""What it runs on a GPU, chosen by a driver that need not be there."""

read_value = torch.ops.aten._local_scalar_dense.default
"""What a dispatch mode sees where Python asks for a tensor's value."""


def is_composite(func: Any) -> bool:
    """Whether an operator is made of others, of which a dispatch mode may see nothing; ``decompose`` takes it apart."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def overload_name(func: Any) -> str:
    """An operator's name as a dispatch mode sees it, without namespace and overload."""
    return func._overloadpacket.__name__


def argument_is_written(func: Any) -> bool:
    """Whether the operator writes into one of its arguments."""
    return func._schema.is_mutable


def inside_autocast(device: str) -> bool:
    """Whether autocast is off here, as it is inside an operator whose operands it has looked at."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(f"Autocast{device.upper()}")


def device_of_fake(x: Tensor) -> torch.device:
    """The device that a fake tensor says it is on."""
    assert isinstance(x, FakeTensor)
    return x.fake_device


@contextmanager
def fake_gpu_tensors() -> Iterator[None]:
    """Inside the block fake tensors on a GPU say so, and autocast works, where there is no GPU.

    ``is_cuda`` and ``is_cpu`` of a fake tensor ask C++, which is told another device (``diversevit_fast.cost.fake``);
    ``torch.autocast`` asks the driver. The block belongs to the process.
    """
    common = torch.cuda.amp.common
    before = common.amp_definitely_not_available, torch.cuda.is_bf16_supported
    FakeTensor.is_cuda = property(lambda x: x.fake_device.type == "cuda")  # pyright: ignore
    FakeTensor.is_cpu = property(lambda x: x.fake_device.type == "cpu")  # pyright: ignore
    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    try:
        yield
    finally:
        common.amp_definitely_not_available, torch.cuda.is_bf16_supported = before
        del FakeTensor.is_cuda, FakeTensor.is_cpu


def is_fake_failure(error: Exception) -> bool:
    """Whether fake tensors could not do what was asked of them; their exceptions have no public names."""
    from torch._subclasses import fake_tensor

    kinds = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
    )
    said = str(error)
    return isinstance(error, kinds) or "FakeTensor" in said or "fake tensor" in said


@contextmanager
def around_backward(enter: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Inside the block every backward pass runs inside what ``enter`` enters; the block belongs to the process.

    ``backward`` and ``autograd.grad`` are themselves calls that a ``TorchFunctionMode`` sees, so the mode is off while
    they run, also for what a checkpoint computes again there.
    """
    engine = torch.autograd._engine_run_backward

    def run(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = engine
