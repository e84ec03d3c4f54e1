"""What a training step costs, from shapes alone."""

from .predict import Cost, cost
from .sizes import Sized, cost_by_size, over_erm

__all__ = ["Cost", "Sized", "cost", "cost_by_size", "over_erm"]
