"""Whole training steps: on a GPU captured once as CUDA graphs and replayed, on a CPU run as they are."""
