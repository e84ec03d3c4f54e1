"""GELU's kernels have no matrix products."""

from ..runtime.counted import Products

PRODUCTS: Products = {}
