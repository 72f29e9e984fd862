"""Blinded points of Curve25519, with which sets are compared without being shown.

A label becomes a point of the curve, and a secret scalar k multiplies it. Multiplication commutes, k·(m·P) = m·(k·P),
so that two sites which blind each other's points get equal values for equal labels. Without k, no party can find the
label of a point by trying labels, if the decisional Diffie-Hellman problem is hard in the curve's large subgroup.

Meadows, "A more efficient cryptographic matchmaking protocol for use in the absence of a continuously available third
party", IEEE S&P 1986, https://doi.org/10.1109/SP.1986.10022; Huberman, Franklin and Hogg, "Enhancing privacy and trust
in electronic communities", ACM EC 1999, https://doi.org/10.1145/336992.337012.
Curve and multiplication: RFC 7748, by the package ``cryptography``. RFC 7748 computes with x coordinates, and accepts
those of the curve's twist. Whether a coordinate is on the twist survives blinding and would reveal one bit of a label,
so labels become points of the curve alone, and all others are refused.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from torch import Tensor

LENGTH = 32
"""Bytes of a point, and of a scalar."""
_FIELD, _A = 2**255 - 19, 486_662


class InvalidPoints(ValueError):
    """A list of points that cannot be blinded. The message says why, without a value."""


def point_of(label: bytes) -> bytes:
    """Return the point of a label: the first hash of the label and a counter that is on the curve."""
    counter = 0
    while True:
        digest = hashlib.sha512(b"polyclinic duplicate search" + counter.to_bytes(4, "big") + label).digest()
        point = (int.from_bytes(digest, "little") % _FIELD).to_bytes(LENGTH, "little")
        if on_curve(point):
            return point
        counter += 1


def on_curve(point: bytes) -> bool:
    """Return whether ``point`` is the canonical coordinate of a point of the curve v² = u³ + A·u² + u."""
    u = int.from_bytes(point, "little")
    return len(point) == LENGTH and u < _FIELD and pow(u * (u * (u + _A) + 1), (_FIELD - 1) // 2, _FIELD) == 1


def blinded(points: Iterable[bytes], scalar: bytes) -> list[bytes]:
    """Return every point multiplied by the secret ``scalar``, 32 random bytes.

    Raises:
        InvalidPoints: If a point is in a small subgroup, in which nothing is hidden.
    """
    key = X25519PrivateKey.from_private_bytes(scalar)
    try:
        return [key.exchange(X25519PublicKey.from_public_bytes(point)) for point in points]
    except ValueError:
        raise InvalidPoints("a point is in a small subgroup of the curve") from None


def tensor_of(points: Iterable[bytes]) -> Tensor:
    """Return points in ascending order, which tells nothing of the order of their labels. Shape [n, 32], uint8."""
    flat = bytearray(b"".join(sorted(points)))
    return torch.frombuffer(flat, dtype=torch.uint8).reshape(-1, LENGTH) if flat else _NONE.clone()


_NONE = torch.zeros(0, LENGTH, dtype=torch.uint8)


def points_of(tensor: Tensor, most: int) -> Sequence[bytes]:
    """Return the points in ``tensor``, which came from someone else.

    Raises:
        InvalidPoints: If it is no list of at most ``most`` different points of the curve.
    """
    if tensor.dtype != torch.uint8 or tensor.ndim != 2 or tensor.shape[1] != LENGTH:
        raise InvalidPoints(f"points are bytes of the shape [n, {LENGTH}]")
    if len(tensor) > most:
        raise InvalidPoints(f"there are {len(tensor)} points, and at most {most} are compared")
    points = [bytes(row) for row in tensor.numpy()]
    if len(set(points)) < len(points):
        raise InvalidPoints("a point occurs twice")
    if not all(map(on_curve, points)):
        raise InvalidPoints("a point is not on the curve")
    return points
