"""What secure summation takes from cryptography, each against a second derivation from the standard's own words."""

import hashlib
import hmac
import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("cryptography", reason="needs polyclinic[privacy]")

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from polyclinic.secure_aggregation import session_keys
from polyclinic.secure_aggregation.session_keys import (
    CHUNK,
    Ed25519PrivateKey,
    ProtocolError,
    Session,
    X25519PrivateKey,
    add_masks_,
    check_signature,
    default_threshold,
    digest,
    least_threshold,
    pair_mask,
    public,
    seal,
    shared_key,
    signature,
    unseal,
    vector_problem,
)

IDENTITY = {
    n: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(n.encode()).digest()) for n in ("cusco", "bern", "ankara")
}
KNOWN = {n: public(key) for n, key in IDENTITY.items()}
SESSION = Session("s1", 4, 7, 3, KNOWN)
ONE, TWO = (X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i in (1, 2))


def sites(n: int) -> dict[str, str]:
    return {f"s{i:02}": "00" * 32 for i in range(n)}


@pytest.mark.parametrize(("n", "threshold"), [(3, 3), (4, 3), (5, 4), (5, 5), (6, 4), (7, 5), (10, 7), (10, 10)])
def test_a_threshold_of_two_thirds_of_at_least_three_sites_is_taken(n: int, threshold: int) -> None:
    assert Session("s", 0, 1, threshold, sites(n)).threshold == threshold


@pytest.mark.parametrize(
    ("n", "threshold"), [(3, 2), (3, 4), (4, 2), (5, 3), (6, 3), (7, 4), (10, 6), (10, 11), (4, 0), (4, -3)]
)
def test_a_threshold_below_two_thirds_or_of_more_than_all_is_refused(n: int, threshold: int) -> None:
    """With fewer, a server that lies and one site could end two sums, over different sites."""
    with pytest.raises(
        ProtocolError, match=rf"two thirds of the {n} sites, never fewer than 3, and at most {n}; it is {threshold}$"
    ):
        Session("s", 0, 1, threshold, sites(n))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_sum_over_two_shows_each_what_the_other_sent(n: int) -> None:
    with pytest.raises(ProtocolError, match=rf"a sum over {n} sites would reveal each"):
        Session("s", 0, 1, 3, sites(n))


@pytest.mark.parametrize("size", [0, -1])
def test_there_must_be_something_to_sum(size: int) -> None:
    with pytest.raises(ProtocolError, match="nothing to sum"):
        Session("s", 0, size, 3, sites(3))


def test_sites_stand_in_name_order_from_place_1() -> None:
    assert SESSION.roster == ("ankara", "bern", "cusco")
    assert [SESSION.place(name) for name in ("ankara", "bern", "cusco")] == [1, 2, 3]


def test_the_context_is_a_hash_of_everything() -> None:
    fields = ["polyclinic secure sum 1", "s1", 4, 7, 3, [[n, KNOWN[n]] for n in sorted(KNOWN)]]
    assert SESSION.context == hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    others = [
        replace(SESSION, id="s2"),
        replace(SESSION, round=5),
        replace(SESSION, size=8),
        replace(SESSION, identities={**KNOWN, "dhaka": KNOWN["bern"]}),
        replace(SESSION, identities={**KNOWN, "bern": KNOWN["cusco"]}),
    ]
    four = replace(SESSION, identities={**KNOWN, "dhaka": KNOWN["bern"]}, threshold=4)
    assert len({s.context for s in (SESSION, *others, four)}) == 7
    assert replace(SESSION, identities=dict(reversed(KNOWN.items()))).context == SESSION.context


def test_two_thirds_of_the_sites_but_three_at_least_must_remain() -> None:
    assert [default_threshold(n) for n in range(1, 14)] == [3, 3, 3, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9]
    for n in range(3, 60):
        t = default_threshold(n)
        assert 3 * t >= 2 * n
        assert t == 3 or 3 * (t - 1) < 2 * n


@pytest.mark.parametrize(
    ("sites", "wanted", "asked", "threshold"),
    [
        (6, None, 6, 4),
        (6, None, 9, 6),
        (5, None, 10, 7),
        (6, 5, 6, 5),
        (6, 5, 9, 5),
        (6, 3, 6, 4),
        (6, 3, 9, 4),
        (9, 7, 10, 7),
        (3, None, 3, 3),
        (10, 5, 12, 7),
    ],
)
def test_what_is_wanted_holds_unless_it_is_below_two_thirds_of_those_who_answered(
    sites: int, wanted: int | None, asked: int, threshold: int
) -> None:
    """Where the terms name no threshold, it is two thirds of all that were asked, however few of them answered."""
    assert least_threshold(sites, wanted, asked) == threshold


def test_a_signature_is_ed25519_over_context_kind_site_and_body() -> None:
    signed = signature(SESSION, IDENTITY["bern"], "kind", "bern", ["a", 1], "b")
    text = json.dumps(["polyclinic secure sum 1", SESSION.context, "kind", "bern", ["a", 1], "b"]).encode()
    assert signed == IDENTITY["bern"].sign(text).hex()
    check_signature(SESSION, signed, "kind", "bern", ["a", 1], "b")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"site": "cusco"},
        {"body": (["a", 2], "b")},
        {"body": (["a", 1],)},
        {"session": replace(SESSION, round=5)},
        {"given": "00" * 64},
        {"given": "no hex"},
        {"given": ""},
        {"given": "00"},
        {"session": replace(SESSION, identities={**KNOWN, "bern": "zz"})},
        {"session": replace(SESSION, identities={**KNOWN, "bern": "00"})},
    ],
)
def test_a_signature_is_good_for_nothing_else(change: dict[str, Any]) -> None:
    signed = signature(SESSION, IDENTITY["bern"], "kind", "bern", ["a", 1], "b")
    how = {"session": SESSION, "given": signed, "kind": "kind", "site": "bern", "body": (["a", 1], "b"), **change}
    with pytest.raises(
        ProtocolError, match=f"the {how['kind']} of {how['site']} has no valid signature for this session"
    ):
        check_signature(how["session"], how["given"], how["kind"], how["site"], *how["body"])


def test_a_stranger_signs_nothing() -> None:
    signed = signature(SESSION, IDENTITY["bern"], "kind", "mallory")
    with pytest.raises(ProtocolError, match="'mallory' is not among the sites of this session"):
        check_signature(SESSION, signed, "kind", "mallory")


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, one block."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def test_a_shared_key_is_hkdf_of_x25519_for_one_purpose_in_one_session() -> None:
    info = json.dumps(["polyclinic secure sum 1", "shares", "ankara", "bern"]).encode()
    expected = hkdf(ONE.exchange(TWO.public_key()), bytes.fromhex(SESSION.context), info)
    assert shared_key(SESSION, ONE, public(TWO), "shares", "ankara", "bern") == expected
    assert shared_key(SESSION, TWO, public(ONE), "shares", "ankara", "bern") == expected
    others = [
        shared_key(SESSION, ONE, public(TWO), "mask", "ankara", "bern"),
        shared_key(SESSION, ONE, public(TWO), "shares", "bern", "ankara"),
        shared_key(replace(SESSION, id="s2"), ONE, public(TWO), "shares", "ankara", "bern"),
    ]
    assert len({expected, *others}) == 4


@pytest.mark.parametrize("theirs", ["00" * 32, "zz" * 32, "00", ""])
def test_what_is_no_public_key_is_refused(theirs: str) -> None:
    with pytest.raises(ProtocolError, match="the keys of ankara and bern do not match"):
        shared_key(SESSION, ONE, theirs, "shares", "ankara", "bern")


def test_a_pairs_mask_is_the_same_from_either_end() -> None:
    info = json.dumps(["polyclinic secure sum 1", "mask", "ankara", "bern"]).encode()
    expected = hkdf(ONE.exchange(TWO.public_key()), bytes.fromhex(SESSION.context), info)
    assert pair_mask(SESSION, ONE, public(TWO), "bern", "ankara") == expected
    assert pair_mask(SESSION, TWO, public(ONE), "ankara", "bern") == expected


def test_what_is_sealed_can_be_opened_with_its_key_and_subject_alone() -> None:
    key, text = bytes(range(32)), b"two shares"
    sealed = seal(key, text, "bern/ankara")
    assert sealed == ChaCha20Poly1305(key).encrypt(bytes(12), text, b"bern/ankara").hex()
    assert unseal(key, sealed, "bern/ankara") == text
    assert unseal(bytes(32), sealed, "bern/ankara") is None
    assert unseal(key, sealed, "ankara/bern") is None
    assert unseal(key, sealed[:-2] + ("00" if sealed[-2:] != "00" else "01"), "bern/ankara") is None
    for nonsense in ("no hex", "", "00"):
        assert unseal(key, nonsense, "bern/ankara") is None


def test_a_digest_is_sha256_of_the_numbers_in_order() -> None:
    vector = torch.arange(6, dtype=torch.int32)
    assert digest(vector) == hashlib.sha256(np.arange(6, dtype="<i4").tobytes()).hexdigest()
    assert digest(vector[::2]) == hashlib.sha256(np.array([0, 2, 4], "<i4").tobytes()).hexdigest()


def test_a_chunk_fits_a_processors_cache_and_is_a_whole_number_of_blocks() -> None:
    assert (4 * CHUNK) % 64 == 0
    assert 2**10 <= CHUNK <= 2**20


def stream(seed: bytes, size: int) -> np.ndarray:
    """The ChaCha20 key stream of a seed, in one piece."""
    return np.frombuffer(Cipher(ChaCha20(seed, bytes(16)), None).encryptor().update(bytes(4 * size)), "<u4")


@pytest.mark.parametrize("size", [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize(("plus", "minus"), [((1, 2), (3,)), ((1,), ()), ((), (4, 5)), ((), ())])
def test_masks_are_chacha20_streams_added_and_taken_off(
    size: int, plus: tuple[int, ...], minus: tuple[int, ...]
) -> None:
    """Across the pieces that they are made in: a stream that began anew in each would repeat the mask."""
    vector = torch.randint(-(2**31), 2**31, (size,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    expected = vector.numpy().view(np.uint32).copy()
    for k, sign in itertools.chain(((k, 1) for k in plus), ((k, -1) for k in minus)):
        expected += stream(bytes([k]) * 32, size) if sign == 1 else -stream(bytes([k]) * 32, size)
    add_masks_(vector, [bytes([k]) * 32 for k in plus], [bytes([k]) * 32 for k in minus])
    assert np.array_equal(vector.numpy().view(np.uint32), expected)


def test_what_a_vector_must_be() -> None:
    assert vector_problem(SESSION, torch.zeros(7, dtype=torch.int32)) is None
    for wrong in (torch.zeros(7), torch.zeros(7, dtype=torch.int64), [0] * 7, None):
        assert vector_problem(SESSION, wrong) == "it must contain 32-bit integers"  # type: ignore[arg-type]
    for shape in ((6,), (8,), (7, 1), (), (1, 7)):
        said = vector_problem(SESSION, torch.zeros(shape, dtype=torch.int32))
        assert said == f"it has shape {shape}, expected 7 numbers"


def test_the_version_is_part_of_every_session() -> None:
    assert session_keys.VERSION.startswith("polyclinic secure sum ")
