"""What an operator has to do at least, counted once: FLOPs of matrix products, and bytes to and from memory.

FLOPs are those of the plain formula as autograd differentiates it, counted by PyTorch on tensors without memory. What
an implementation computes again to save memory is not work, so attention's backward counts twice its forward (papers
count 2.5 times). A causal mask leaves the pairs on and below the diagonal.

Bytes: each order reads its operands once and writes its results once. The forward reads the inputs and writes the
output; the backward reads the inputs and the output's cotangent and writes a gradient per input; the double backward
reads these, with a cotangent per gradient, and writes a gradient per input and one for the output's cotangent.
"""

import functools
import math

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.orders import BWD, FWD
from benchmarks.workloads import OperatorSpec, eager_function, meta_tensors, run


@functools.cache
def flops(spec: OperatorSpec) -> int:
    """Return the FLOPs of the matrix products of all orders up to the spec's; 0 for an operator without any."""
    tensors = meta_tensors(spec)
    with FlopCounterMode(display=False) as counted:
        run(eager_function(spec), tensors, spec.order)
    total = counted.get_total_flops()
    if not spec.causal:
        return total
    N = spec.shapes[0][-2]
    return total * (N + 1) // (2 * N)


@functools.cache
def moved_bytes(spec: OperatorSpec) -> int:
    """Return the bytes that all orders up to the spec's read and write at least."""
    t = meta_tensors(spec)
    inputs = sum(math.prod(shape) for shape in spec.shapes) * spec.dtype.itemsize
    output = t.do.numel() * t.do.element_size()
    total = inputs + output
    if spec.order == FWD:
        return total
    total += 2 * inputs + output
    return total if spec.order == BWD else total + 3 * inputs + 2 * output
