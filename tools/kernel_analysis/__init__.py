"""Analysis of kernels that times nothing: their machine code, what they load, store and compute, counted operations.

``compile_report``, ``roofline`` and ``issue_slots`` analyse the Triton kernels and need no GPU; ``ratios`` counts what
the CPU's kernels ask of the machine.
"""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
"""Where ``compile_report`` and ``roofline`` store what they found; not in the repository."""
