"""Shamir's sharing over the field of 2^521 - 1, against whole numbers written out, and at its limits."""

import hashlib
from collections.abc import Callable

import pytest

from polyclinic.secure_aggregation import shamir

P = (1 << 521) - 1
SECRET = bytes(range(32))


def entropy() -> Callable[[int], bytes]:
    """Known bytes, different every time."""
    count = iter(range(1000))
    return lambda n: b"".join(hashlib.sha256(bytes([next(count), i])).digest() for i in range(3))[:n]


@pytest.mark.parametrize("threshold", [1, 2, 3, 5])
def test_shares_are_values_of_the_polynomial(threshold: int) -> None:
    take = entropy()
    a = [int.from_bytes(SECRET, "big")] + [int.from_bytes(take(66), "big") // 2**7 for _ in range(threshold - 1)]
    assert all(2**500 < c < 2**521 for c in a[1:])
    expected = {x: (sum(c * x**k for k, c in enumerate(a)) % P).to_bytes(66, "big") for x in (1, 2, 3, 9, 40)}
    assert shamir.split(SECRET, threshold, [1, 2, 3, 9, 40], entropy()) == expected
    assert shamir.rebuild(dict(list(expected.items())[:threshold])) == SECRET


def test_every_coefficient_is_drawn_anew() -> None:
    asked: list[int] = []
    take = entropy()

    def counted(n: int) -> bytes:
        asked.append(n)
        return take(n)

    shamir.split(SECRET, 4, range(1, 6), counted)
    assert asked == [66, 66, 66]


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, b"\x00" * 31 + b"\x01", b"\x80" + bytes(31)])
def test_the_smallest_and_the_largest_secret_come_back(secret: bytes) -> None:
    shares = shamir.split(secret, 2, [1, P - 1], entropy())
    assert shamir.rebuild(shares) == secret


@pytest.mark.parametrize(
    ("secret", "places"),
    [
        (bytes(31), [1, 2]),
        (bytes(33), [1, 2]),
        (b"", [1, 2]),
        (SECRET, [1, 1]),
        (SECRET, [0, 1]),
        (SECRET, [-1, 1]),
        (SECRET, [P, 1]),
        (SECRET, [1, P + 1]),
    ],
)
def test_a_place_twice_or_at_zero_would_give_the_secret_away(secret: bytes, places: list[int]) -> None:
    with pytest.raises(ValueError, match="a secret has 32 bytes, and places are distinct integers above 0"):
        shamir.split(secret, 1, places, entropy())


@pytest.mark.parametrize("threshold", [-1, 0, 3])
def test_a_threshold_is_from_one_to_as_many_as_there_are(threshold: int) -> None:
    with pytest.raises(ValueError, match=rf"{threshold} is not between 1 and the number of shares, 2"):
        shamir.split(SECRET, threshold, [1, 2], entropy())
    assert len(shamir.split(SECRET, 2, [1, 2], entropy())) == 2


@pytest.mark.parametrize("share", [bytes(65), bytes(67), b"", P.to_bytes(66, "big"), b"\xff" * 66])
def test_what_is_no_share_is_refused(share: bytes) -> None:
    good = (P - 1).to_bytes(66, "big")
    with pytest.raises(ValueError, match="a share has 66 bytes and encodes a number below the prime"):
        shamir.rebuild({1: good, 2: share})


def test_the_largest_number_of_the_field_is_a_share() -> None:
    """Of f(x) = 5 - 6x: f(1) = -1 mod p."""
    assert shamir.rebuild({1: (P - 1).to_bytes(66, "big"), 2: (P - 7).to_bytes(66, "big")}) == (5).to_bytes(32, "big")


@pytest.mark.parametrize(("value", "fits"), [(2**256 - 1, True), (2**256, False), (2**256 + 1, False), (P - 1, False)])
def test_a_secret_has_256_bits_or_the_shares_are_not_of_one(value: int, fits: bool) -> None:
    share = {7: value.to_bytes(66, "big")}
    if fits:
        assert shamir.rebuild(share) == value.to_bytes(32, "big")
    else:
        with pytest.raises(ValueError, match="these are not shares of one secret"):
            shamir.rebuild(share)


def test_one_share_too_few_gives_something_else() -> None:
    shares = shamir.split(SECRET, 3, range(1, 6), entropy())
    with pytest.raises(ValueError, match="not shares of one secret"):
        shamir.rebuild({x: shares[x] for x in (1, 2)})


def test_lagranges_formula_anywhere() -> None:
    points = {x: (3 * x**2 + 2 * x + 1) % P for x in (1, 4, 9)}
    assert [shamir.evaluate(points, x) for x in (0, 1, 2, 100)] == [1, 6, 17, 30201]
    assert shamir.evaluate({5: 8}, 0) == 8
    assert shamir.evaluate(points, -1) == 2
