"""What every Triton kernel needs: the device, launch plans, launches, tensors, tiles, sums."""
