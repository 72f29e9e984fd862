"""Array types of the statistics, and the error for a value that the data do not determine."""

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import PolyclinicError

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


class Undefined(PolyclinicError, ValueError):
    """A statistic that the given cases do not determine. The message states the reason."""
