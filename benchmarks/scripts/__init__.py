"""Measurements that are programs of their own; each stores what it prints in ``benchmarks/results``."""
