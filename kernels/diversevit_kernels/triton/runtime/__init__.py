"""The runtime of the Triton kernels: the device, launch plans, launches, tensors, tiles, sums."""
