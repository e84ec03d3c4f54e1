"""Instruments for Triton's interpreter: faster runs, a count of what kernels do, a check of every address.

They work on any kernel, whoever launches it, and need ``TRITON_INTERPRET=1``. The tests of the kernels use them too.
"""
