"""What only some of the supported versions of PyTorch can do."""

import pytest
import torch

compiles_losses = pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="dvf.compile_loss needs PyTorch 2.14"
)


def quiet_export(test):
    """PyTorch 2.10 copies and loads an exported program with warnings about its own code."""
    for said in (
        "ignore:.isinstance.treespec, LeafSpec:FutureWarning",
        "ignore:The given buffer is not",
    ):
        test = pytest.mark.filterwarnings(said)(test)
    return test
