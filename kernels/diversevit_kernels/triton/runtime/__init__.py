"""What every Triton kernel needs: launches, configurations, tiles, strided tensors."""
