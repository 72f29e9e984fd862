"""Cryptographic primitives of the protocol: sessions, signatures, shared keys and masks."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey as Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey as X25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

from polyclinic.core.serialization import savable
from polyclinic.errors import ProtocolError as ProtocolError

VERSION = "polyclinic secure sum 1"
CHUNK = 2**16  # numbers masked at a time, to fit the processor's cache


@savable("secure-sum.Session", 1)
@dataclass(frozen=True)
class Session:
    """Parameters on which all parties agree before a sum. A retry is a new session.

    Attributes:
        id: Unique to this session; the server draws it.
        round: The round whose replies are summed.
        size: Number of values of each site.
        threshold: Minimum number of sites that must remain to the end.
        identities: The Ed25519 public key of each site, in hexadecimal, by name. A site uses its own record of them,
            never the server's.
    """

    id: str
    round: int
    size: int
    threshold: int
    identities: Mapping[str, str]

    def __post_init__(self) -> None:
        n = len(self.identities)
        if n < 3:
            raise ProtocolError(f"a sum over {n} sites would reveal each site's values: at least 3 are required")
        if not default_threshold(n) <= self.threshold <= n:
            raise ProtocolError(
                f"the threshold must be at least {default_threshold(n)}, two thirds of the {n} sites, "
                f"never fewer than 3, and at most {n}; it is {self.threshold}"
            )
        if self.size < 1:
            raise ProtocolError("there is nothing to sum")

    @cached_property
    def roster(self) -> tuple[str, ...]:
        """The sites, in name order."""
        return tuple(sorted(self.identities))

    @cached_property
    def context(self) -> str:
        """A hash of all fields. It is part of everything that is signed or derived."""
        fields = [VERSION, self.id, self.round, self.size, self.threshold, sorted(self.identities.items())]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    def place(self, site: str) -> int:
        """Return the point of the polynomial at which a site's shares are evaluated."""
        return self.roster.index(site) + 1


def default_threshold(sites: int) -> int:
    """Return two thirds of the sites, at least 3: secure against a malicious server (Bonawitz, section 6).

    With this threshold t of n, a server that shows two lists of survivors to two groups of sites needs t - c honest
    sites in each, where c collude with it: 2 (t - c) <= n - c, so c >= n / 3.
    """
    return max(3, -(-2 * sites // 3))


def least_threshold(sites: int, wanted: int | None, asked: int) -> int:
    """Return the threshold of a sum over ``sites`` that answered of those ``asked``; ``wanted`` is from the terms."""
    return max(wanted or default_threshold(asked), default_threshold(sites))


def signature(session: Session, key: Ed25519PrivateKey, kind: str, site: str, *body: object) -> str:
    """Sign a message of ``kind`` as ``site``, in hexadecimal."""
    return key.sign(_signed(session, kind, site, body)).hex()


def check_signature(session: Session, given: str, kind: str, site: str, *body: object) -> None:
    """Verify that ``given`` is ``site``'s signature of this message in this session.

    Raises:
        ProtocolError: If it is not. The message names the site.
    """
    if site not in session.identities:
        raise ProtocolError(f"{site!r} is not among the sites of this session")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(session.identities[site]))
        key.verify(bytes.fromhex(given), _signed(session, kind, site, body))
    except (InvalidSignature, ValueError):
        raise ProtocolError(
            f"the {kind} of {site} has no valid signature for this session: forged, altered, or replayed from another"
        ) from None


def _signed(session: Session, kind: str, site: str, body: tuple[object, ...]) -> bytes:
    return json.dumps([VERSION, session.context, kind, site, *body]).encode()


def shared_key(session: Session, mine: X25519PrivateKey, theirs: str, purpose: str, first: str, second: str) -> bytes:
    """Derive 32 bytes that only two sites can compute, for one purpose in one session.

    Raises:
        ProtocolError: If ``theirs`` is not a valid public key.
    """
    try:
        secret = mine.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(theirs)))
    except ValueError:
        raise ProtocolError(f"the keys of {first} and {second} do not match") from None
    info = json.dumps([VERSION, purpose, first, second]).encode()
    return HKDF(SHA256(), 32, salt=bytes.fromhex(session.context), info=info).derive(secret)


def pair_mask(session: Session, mine: X25519PrivateKey, theirs: str, one: str, other: str) -> bytes:
    """Derive the seed of the mask between two sites, equal at both."""
    first, second = sorted((one, other))
    return shared_key(session, mine, theirs, "mask", first, second)


def seal(key: bytes, text: bytes, about: str) -> str:
    """Encrypt ``text``, bound to ``about``. Each key encrypts one text, so the nonce may be 0."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, about.encode()).hex()


def unseal(key: bytes, sealed: str, about: str) -> bytes | None:
    """Decrypt the result of ``seal``; None if it was altered."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), bytes.fromhex(sealed), about.encode())
    except (InvalidTag, ValueError):
        return None


def public(key: X25519PrivateKey | Ed25519PrivateKey) -> str:
    """Return the public key in hexadecimal."""
    return key.public_key().public_bytes_raw().hex()


def digest(vector: Tensor) -> str:
    """Return the SHA-256 of the vector's bytes."""
    return hashlib.sha256(vector.contiguous().numpy().data).hexdigest()


def add_masks_(vector: Tensor, plus: list[bytes], minus: list[bytes]) -> None:
    """Add the ChaCha20 streams of the seeds in ``plus`` to ``vector``, and subtract those in ``minus``, mod 2³².

    Args:
        vector: Shape [size], int32, modified in place.
        plus: Seeds of 32 bytes each, which must be used for this vector only.
        minus: The same.
    """
    numbers = vector.numpy().view(np.uint32)
    streams = [
        (Cipher(ChaCha20(seed, bytes(16)), None).encryptor(), sign)
        for sign in (1, -1)
        for seed in (plus if sign == 1 else minus)
    ]
    zeros, buffer = bytes(4 * CHUNK), bytearray(4 * CHUNK + 64)
    drawn = np.frombuffer(buffer, dtype="<u4", count=CHUNK)
    for begin in range(0, len(numbers), CHUNK):
        part = numbers[begin : begin + CHUNK]
        for stream, sign in streams:
            stream.update_into(zeros, buffer)
            if sign == 1:
                part += drawn[: len(part)]
            else:
                part -= drawn[: len(part)]


def vector_problem(session: Session, vector: Tensor) -> str | None:
    """Return why ``vector`` cannot be summed in this session; None if it can."""
    if not isinstance(vector, Tensor) or vector.dtype != torch.int32:
        return "it must contain 32-bit integers"
    if vector.shape != (session.size,):
        return f"it has shape {tuple(vector.shape)}, expected {session.size} numbers"
    return None
