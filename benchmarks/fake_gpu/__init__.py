"""A GPU that computes nothing, for measuring and testing host code on any machine; see README.md.

python -m benchmarks.fake_gpu program.py arguments
"""
