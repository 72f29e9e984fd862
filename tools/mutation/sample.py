"""Draw a random sample of mutants, and estimate the mutation score from it."""

import hashlib
from collections.abc import Iterable

from scipy.stats import binomtest


def drawn(keys: Iterable[str], number: int, seed: int) -> list[str]:
    """Return ``number`` of ``keys``, or all of them if there are fewer: a simple random sample without replacement.

    It depends on the seed and the keys only, not on their order. A larger sample with the same seed contains the
    smaller one, and the sample of a part of the keys contains what the sample of all keys has of that part.

    Raises:
        ValueError: If ``number`` is less than 1.
    """
    if number < 1:
        raise ValueError(f"a sample of {number} mutants: at least one is needed")
    return sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())[:number]


def score(killed: int, tried: int) -> str:
    """Return the share of mutants that were killed, with its exact 95 % interval (Clopper and Pearson, 1934).

    Args:
        killed: Number of mutants of the sample that a test noticed.
        tried: Number of mutants of the sample.
    """
    if not tried:
        return "none tried"
    low, high = binomtest(killed, tried).proportion_ci(0.95, method="exact")
    return f"{killed} of {tried} killed ({killed / tried:.1%}, 95 % interval {low:.1%} to {high:.1%})"
