"""Kernels for CPU tensors: C++ compiled on first use, with a blocked PyTorch fallback.

Each operator's ``dispatch`` decides which of the two runs; both work on tiles that fit the processor's caches.
"""
