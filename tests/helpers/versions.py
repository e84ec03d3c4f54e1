"""What only some of the supported versions of PyTorch can do."""

import pytest
import torch

compiles_losses = pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="dvf.compile_loss needs PyTorch 2.14"
)
traces_gradients = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="PyTorch 2.11 and later trace autograd.grad",
)


def quiet_export(test):
    """PyTorch 2.10 copies and loads an exported program with warnings about its own code."""
    for said in (
        "ignore:.isinstance.treespec, LeafSpec:FutureWarning",
        "ignore:The given buffer is not",
    ):
        test = pytest.mark.filterwarnings(said)(test)
    return test
