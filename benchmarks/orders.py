"""The orders of differentiation that are measured, as rows and tables name them.

Each contains those before it: ``fwd`` is the forward alone, ``fwd+bwd`` in addition the gradients of the inputs,
``fwd+bwd+double bwd`` in addition the derivatives of these gradients.
"""

FWD, BWD, DOUBLE_BWD = ORDERS = ("fwd", "fwd+bwd", "fwd+bwd+double bwd")
