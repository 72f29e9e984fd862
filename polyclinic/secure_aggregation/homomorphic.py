"""Encrypted sums: the server adds numbers that it cannot read.

Jung Hee Cheon, Andrey Kim, Miran Kim and Yongsoo Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers"
(CKKS), ASIACRYPT 2017, as computed by TenSEAL (Benaissa, Retiat, Cebere and Belfedhal, 2021,
https://arxiv.org/abs/2104.03152); for hospitals as in Stripelis et al., "Secure federated learning for neuroimaging",
2022, https://arxiv.org/abs/2205.05249.

The sites hold one secret key together. They encrypt, the server adds, one site decrypts the sum and tells the server.
So a site that works with the server can open every other site's update. ``SecureSum`` needs no such trust, and about a
fourteenth of the bytes and a thirtieth of the time; this is for those whose rules ask for encryption by name.

There is no noise flooding. What CKKS decrypts to is the message plus an error that depends on the secret key, and
whoever sees ciphertexts *and* what they decrypt to can compute the key from the two: Baiyu Li and Daniele Micciancio,
"On the Security of Homomorphic Encryption on Approximate Numbers", EUROCRYPT 2021, https://eprint.iacr.org/2020/1533.
The server here sees both, so it must be assumed to be able to read every update. This hides updates from who sees
ciphertexts only, such as a network, a store or a backup, and from a server that never sees a decrypted sum. The
remedy is normal noise on each decrypted number, of a deviation 2^(s/2) times the error's for s bits of security,
which no parameters here leave room for: at s = 40 it is 2^20 times an error of about 1e-8, beside updates of about
1e-3.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.errors import ConfigError, MissingDependency

DEGREE, MODULI, SCALE = 8192, (60, 40, 60), 2.0**40
SLOTS = DEGREE // 2  # numbers in one ciphertext


class Cost(NamedTuple):
    """What encrypting so many numbers takes: ciphertexts, their bytes, and how many times the plain bytes that is."""

    chunks: int
    nbytes: int
    times: float

    def __str__(self) -> str:
        return f"{self.chunks} ciphertexts, {self.nbytes / 1e6:.1f} MB a site, {self.times:.1f} times the plain numbers"


@dataclass(frozen=True)
class Keys:
    """Both halves of a key pair.

    Attributes:
        secret: For the sites only. Decrypts.
        public: For everyone. Encrypts and adds.
    """

    secret: bytes
    public: bytes

    @classmethod
    def make(cls) -> "Keys":
        """A new pair, of 128 bits of security."""
        context = _tenseal().context(_tenseal().SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(MODULI))
        context.global_scale = SCALE
        secret = context.serialize(save_secret_key=True)
        context.make_context_public()
        return cls(secret, context.serialize())


def cost(size: int, keys: Keys) -> Cost:
    """What encrypting ``size`` numbers takes, from the size of one real ciphertext."""
    one = len(next(encrypt(torch.zeros(1), keys.public)))
    chunks = math.ceil(size / SLOTS)
    return Cost(chunks, chunks * one, chunks * one / (4 * size))


def encrypt(vector: Tensor, public: bytes) -> Iterator[bytes]:
    """Ciphertexts of ``vector`` [size], one after the other.

    Raises:
        ValueError: Where a number is not finite.
    """
    if not bool(vector.isfinite().all()):
        raise ConfigError("NaN and infinities cannot be encrypted: lower the learning rate")
    context = _tenseal().context_from(public)
    for chunk in vector.double().split(SLOTS):
        yield _tenseal().ckks_vector(context, chunk.tolist()).serialize()


def add(chunks: Sequence[bytes], public: bytes, size: int) -> bytes:
    """The encrypted sum of one ciphertext of ``size`` numbers from each site.

    Raises:
        ValueError: Where one is broken or of another size. An empty one would otherwise count as an empty vector.
    """
    context, total = _tenseal().context_from(public), None
    for number, chunk in enumerate(chunks):
        one = _opened(context, chunk, size, f"ciphertext {number}")
        total = one if total is None else total + one
    if total is None:
        raise ConfigError("there is nothing to add")
    found: bytes = total.serialize()
    return found


def decrypt(chunk: bytes, secret: bytes, size: int) -> Tensor:
    """The numbers in a ciphertext. Shape [size], float64.

    Raises:
        ValueError: Where it is broken or of another size.
    """
    numbers = _opened(_tenseal().context_from(secret), chunk, size, "the sum").decrypt()
    return torch.tensor(numbers[:size], dtype=torch.float64)


def encrypted_merge(replies: Mapping[str, Reply], keys: Keys, *, memory: int | None = None) -> Reply:
    """What ``merge(replies.values())`` gives, to about seven digits, computed on ciphertexts.

    Args:
        replies: By site. Any method that sends means only, with their weights.
        keys: The sites' keys; the adding uses the public half only.
        memory: The bytes that one site's ciphertexts may take; half of this machine's by default.

    Raises:
        ValueError: Where a reply holds something else than means, where replies differ, or where they are too large.
    """
    vectors, like = {}, next(iter(replies.values()))
    for site, reply in sorted(replies.items()):
        if odd := sorted(part for part, stat in reply.parts.items() if not isinstance(stat, WeightedMean)):
            raise ConfigError(f"{site} sends {odd}, which is no mean: only sums can be added in encryption")
        if _layout(reply) != _layout(like):
            raise ConfigError(f"{site} would send tensors of other names or shapes than the others")
        vectors[site] = _vector(reply)
    size = len(next(iter(vectors.values())))
    price, allowed = cost(size, keys), memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if price.nbytes > allowed:
        raise ConfigError(
            f"encrypted, this model takes {price}, and {allowed / 1e6:.0f} MB are allowed: use "
            "SecureSum, which takes no more bytes than the model itself"
        )
    streams = [encrypt(vector, keys.public) for vector in vectors.values()]
    parts = []
    for index in range(price.chunks):
        held = min(SLOTS, size - index * SLOTS)
        parts.append(decrypt(add([next(stream) for stream in streams], keys.public, held), keys.secret, held))
    return _reply(torch.cat(parts), like)


def _layout(reply: Reply) -> list[tuple[str, str, tuple[int, ...]]]:
    parts = sorted(reply.parts)
    return [(part, name, tuple(leaf.shape)) for part in parts for name, leaf in reply.mean(part).total.items()]


def _vector(reply: Reply) -> Tensor:
    """Everything that is summed: of each part the numbers, and the weight."""
    means = [reply.mean(part) for part in sorted(reply.parts)]
    return torch.cat([torch.cat([tree.flatten(m.total).double(), torch.tensor([m.weight]).double()]) for m in means])


def _reply(vector: Tensor, like: Reply) -> Reply:
    parts, start = {}, 0
    for part in sorted(like.parts):
        shapes = like.mean(part).total
        end = start + tree.size(shapes)
        total = tree.unflatten(vector[start:end], shapes)
        parts[part] = WeightedMean(
            {name: leaf.to(shapes[name].dtype) for name, leaf in total.items()}, float(vector[end])
        )
        start = end + 1
    return Reply(parts)


def _opened(context: Any, chunk: bytes, size: int, what: str) -> Any:
    try:
        found = _tenseal().ckks_vector_from(context, chunk)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} is broken: {error}") from None
    if found.size() != size:
        raise ConfigError(f"{what} holds {found.size()} numbers, where {size} were agreed")
    return found


def _tenseal() -> Any:
    try:
        import tenseal
    except ImportError as error:
        raise MissingDependency("he", "encrypted sums need tenseal") from error
    return tenseal
