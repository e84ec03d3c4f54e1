"""Observe and change the attention of any vision transformer, without changing its code or state."""
