"""Addresses of tensors for the C++ kernels, which take none for a tensor that is not there."""

from collections.abc import Mapping

from torch import Tensor


def pointers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The addresses of the tensors' first elements, 0 of tensors without elements.

    Raises:
        RuntimeError: a tensor's memory was freed; most of PyTorch's own operators raise then too.
    """
    found = {name: x.data_ptr() for name, x in tensors.items()}
    if 0 in found.values():
        for name, x in tensors.items():
            if not found[name] and x.numel():
                raise RuntimeError(
                    f"{name}: the memory of this tensor {list(x.shape)} was freed, as FSDP2 frees gathered "
                    "parameters after a backward pass"
                )
    return found
