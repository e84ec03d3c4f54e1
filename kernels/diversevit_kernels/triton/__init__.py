"""Triton kernels: a folder per operator, with the same functions as ``diversevit_kernels.cpu``.

``attention``, ``layer_norm``, ``gelu``, ``head_penalty``
    kernels, the functions that launch them, and their launch configurations (``configs.py``).
``runtime``
    what they stand on: ``device`` is the one place that looks at the device and the environment, ``plan`` finds the
    configuration of a launch, ``launch`` runs kernels, ``tensors`` checks their arguments and allocates their results,
    ``tiles`` and the rest are functions that several operators use.
"""
