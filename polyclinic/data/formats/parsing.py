"""Words in a table, and the numbers they stand for."""

import numpy as np


def plain(word: str) -> str:
    """A whole number without its point, so that 4 and 4.0 are one category."""
    return f"{float(word):.0f}" if is_number(word) and float(word).is_integer() else word


def is_number(word: str) -> bool:
    """Whether ``word`` is a finite number."""
    try:
        return bool(np.isfinite(float(word)))
    except ValueError:
        return False
