"""Shamir secret sharing: any ``threshold`` holders can rebuild a secret, and fewer learn nothing.

Adi Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979: the secret is the value at 0 of a
random polynomial of degree threshold - 1; a share is its value at another point. Over the prime field of 2⁵²¹ - 1.
"""

from collections.abc import Callable, Mapping, Sequence

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66


def split(secret: bytes, threshold: int, places: Sequence[int], entropy: Callable[[int], bytes]) -> dict[int, bytes]:
    """Return one share of the 32-byte ``secret`` for each of ``places``, which are distinct integers above 0."""
    if len(secret) != SECRET_BYTES or len(set(places)) != len(places) or not all(0 < x < PRIME for x in places):
        raise ValueError("a secret has 32 bytes, and places are distinct integers above 0")
    if not 1 <= threshold <= len(places):
        raise ValueError(f"the threshold {threshold} is not between 1 and the number of shares, {len(places)}")
    # f(x) = secret + a₁ x + ... + a_{t-1} x^{t-1}, each a from 521 random bits
    drawn = [int.from_bytes(entropy(SHARE_BYTES)) >> 7 for _ in range(threshold - 1)]
    coefficients = [int.from_bytes(secret), *drawn]
    return {x: _value(coefficients, x).to_bytes(SHARE_BYTES) for x in places}


def rebuild(shares: Mapping[int, bytes]) -> bytes:
    """Rebuild the secret from ``shares`` by place. Exactly as many as the threshold are needed.

    Raises:
        ValueError: If the shares cannot be those of a 32-byte secret.
    """
    points = {x: int.from_bytes(share) for x, share in shares.items()}
    if any(len(share) != SHARE_BYTES for share in shares.values()) or any(y >= PRIME for y in points.values()):
        raise ValueError("a share has 66 bytes and encodes a number below the prime")
    secret = evaluate(points, 0)
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("these are not shares of one secret")
    return secret.to_bytes(SECRET_BYTES)


def evaluate(points: Mapping[int, int], at: int) -> int:
    """Evaluate the polynomial through ``points`` at ``at`` (Lagrange interpolation)."""
    total = 0
    for x, y in points.items():
        above, below = y, 1
        for other in points:
            if other != x:
                above, below = above * (at - other) % PRIME, below * (x - other) % PRIME
        total += above * pow(below, -1, PRIME)
    return total % PRIME


def _value(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value
