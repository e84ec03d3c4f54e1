"""Triton kernels, a module per stage with the same functions as ``diversevit_kernels.cpu``.

``configurations`` is the one place that looks at the device, ``launch`` the one that starts kernels and
allocates their results, ``tiles`` the small device functions that every stage shares.
"""
