"""The penalty on the gradients of attention heads, for any training loop."""
