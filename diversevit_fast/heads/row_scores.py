"""RowScores: what a criterion gives every row of a ``HeadTable``."""

from typing import NamedTuple

from torch import Tensor


class RowScores(NamedTuple):
    """Scores of the rows of a table, larger is better.

    Attributes:
        values: float64 ``[R]``; NaN leaves a row out.
        errors: standard errors, float64 ``[R]``; None if they are not known.
    """

    values: Tensor
    errors: Tensor | None = None
