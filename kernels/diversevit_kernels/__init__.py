"""Kernels without autograd: plain functions on tensors, in a folder per backend and operator.

``triton``   kernels for GPUs; interpreted on a CPU with ``TRITON_INTERPRET=1``.
``cpu``      C++ compiled on first use, with blocked PyTorch where there is no compiler.
``common``   what both share: dtypes, groups of the penalty, environment switches, forks.

Both backends have ``<operator>_{forward,backward,double_backward}`` for attention, layer_norm, gelu, head_penalty and
routed_head_penalty. The equations are derived and numbered in ``kernels/README.md``.
"""
