"""Kernels of diversevit_fast: plain functions on tensors, one module per pipeline stage and backend.

``cpu``   blocked PyTorch: tiles that fit the cache, scratch allocated once per call.

Nothing here knows autograd, operators or models; the derivations are in ``kernels/README.md``.
"""
