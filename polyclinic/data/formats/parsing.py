"""Parsing of numbers in table cells."""

import numpy as np


def plain(word: str) -> str:
    """Return an integer without its decimal point, so that 4 and 4.0 are one category; other text unchanged."""
    return f"{float(word):.0f}" if is_number(word) and float(word).is_integer() else word


def is_number(word: str) -> bool:
    """Return whether ``word`` is a finite number."""
    try:
        return bool(np.isfinite(float(word)))
    except ValueError:
        return False
