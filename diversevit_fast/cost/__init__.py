"""What a training step costs, from shapes alone."""

from .predict import Cost, cost

__all__ = ["Cost", "cost"]
