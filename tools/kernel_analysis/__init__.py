"""Static analysis of the Triton kernels: machine code, traffic and work, without a GPU."""
