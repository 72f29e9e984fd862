"""What the protocol takes from cryptography: sessions, signatures, shared keys and masks."""

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
CHUNK = 2**16  # numbers masked at a time, so that they stay in the processor's cache


@savable("secure-sum.Session", 1)
@dataclass(frozen=True)
class Session:
    """What everybody must agree on before a sum. A retry is a new session.

    Attributes:
        id: Unique to this session; the server draws it.
        round: The round whose replies are summed.
        size: How many numbers each site sends.
        threshold: How many sites must remain to the end.
        identities: The Ed25519 public key of each site, in hexadecimal, by name. A site takes them from its own
            records, never from the server.
    """

    id: str
    round: int
    size: int
    threshold: int
    identities: Mapping[str, str]

    def __post_init__(self) -> None:
        n = len(self.identities)
        if n < 3:
            raise ProtocolError(f"a sum over {n} sites shows each what the other sent: at least 3 are needed")
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
        """A hash of all of the above. It is part of everything that is signed or derived."""
        fields = [VERSION, self.id, self.round, self.size, self.threshold, sorted(self.identities.items())]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()

    def place(self, site: str) -> int:
        """Where a site's shares lie on the polynomial."""
        return self.roster.index(site) + 1


def default_threshold(sites: int) -> int:
    """Two thirds of the sites, and 3 at the least: what protects from a server that lies (Bonawitz, section 6).

    With this threshold t of n, a server that shows two lists of survivors to two groups of sites needs t - c honest
    sites in each, where c collude with it: 2 (t - c) <= n - c, so c >= n / 3.
    """
    return max(3, -(-2 * sites // 3))


def least_threshold(sites: int, wanted: int | None, asked: int) -> int:
    """The threshold of a sum over ``sites`` that answered of those that were ``asked``; ``wanted`` as the terms say."""
    return max(wanted or default_threshold(asked), default_threshold(sites))


def signature(session: Session, key: Ed25519PrivateKey, kind: str, site: str, *body: object) -> str:
    """What ``site`` signs for a message of ``kind``, in hexadecimal."""
    return key.sign(_signed(session, kind, site, body)).hex()


def check_signature(session: Session, given: str, kind: str, site: str, *body: object) -> None:
    """Raises unless ``given`` is ``site``'s signature of this message in this session.

    Raises:
        ProtocolError: Naming the site.
    """
    if site not in session.identities:
        raise ProtocolError(f"{site!r} is not among the sites of this session")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(session.identities[site]))
        key.verify(bytes.fromhex(given), _signed(session, kind, site, body))
    except (InvalidSignature, ValueError):
        raise ProtocolError(
            f"the {kind} of {site} is not signed by it for this session: forged, altered, or replayed from another"
        ) from None


def _signed(session: Session, kind: str, site: str, body: tuple[object, ...]) -> bytes:
    return json.dumps([VERSION, session.context, kind, site, *body]).encode()


def shared_key(session: Session, mine: X25519PrivateKey, theirs: str, purpose: str, first: str, second: str) -> bytes:
    """32 bytes that only two sites know, for one purpose in one session.

    Raises:
        ProtocolError: Where ``theirs`` is no public key.
    """
    try:
        secret = mine.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(theirs)))
    except ValueError:
        raise ProtocolError(f"the keys of {first} and {second} do not fit") from None
    info = json.dumps([VERSION, purpose, first, second]).encode()
    return HKDF(SHA256(), 32, salt=bytes.fromhex(session.context), info=info).derive(secret)


def pair_mask(session: Session, mine: X25519PrivateKey, theirs: str, one: str, other: str) -> bytes:
    """The seed of the mask between two sites: the same from either end."""
    first, second = sorted((one, other))
    return shared_key(session, mine, theirs, "mask", first, second)


def seal(key: bytes, text: bytes, about: str) -> str:
    """``text``, encrypted and bound to ``about``. Each key seals one text, so the nonce may be 0."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, about.encode()).hex()


def unseal(key: bytes, sealed: str, about: str) -> bytes | None:
    """The inverse of ``seal``; None where it was altered."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), bytes.fromhex(sealed), about.encode())
    except (InvalidTag, ValueError):
        return None


def public(key: X25519PrivateKey | Ed25519PrivateKey) -> str:
    """The public half, in hexadecimal."""
    return key.public_key().public_bytes_raw().hex()


def digest(vector: Tensor) -> str:
    """SHA-256 of the vector's bytes."""
    return hashlib.sha256(vector.contiguous().numpy().data).hexdigest()


def add_masks_(vector: Tensor, plus: list[bytes], minus: list[bytes]) -> None:
    """Adds the ChaCha20 streams of the seeds in ``plus`` to ``vector`` and takes off those in ``minus``, mod 2³².

    Args:
        vector: Shape [size], int32, which is changed.
        plus: Seeds of 32 bytes each, every one of them used for this vector only.
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
    """Why ``vector`` cannot be summed in this session, if it cannot."""
    if not isinstance(vector, Tensor) or vector.dtype != torch.int32:
        return "it must hold 32-bit integers"
    if vector.shape != (session.size,):
        return f"it has the shape {tuple(vector.shape)}, where {session.size} numbers were agreed"
    return None
