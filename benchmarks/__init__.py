"""Measurements: always ratios of medians in one process, interleaved, after a correctness gate."""
