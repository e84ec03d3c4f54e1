"""What only some of the supported versions of PyTorch can do."""

import pytest
import torch

compiles_losses = pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="dvf.compile_loss needs PyTorch 2.14"
)
