"""Homomorphic encryption: the server adds encrypted numbers.

Jung Hee Cheon, Andrey Kim, Miran Kim and Yongsoo Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers"
(CKKS), ASIACRYPT 2017, as computed by TenSEAL (Benaissa, Retiat, Cebere and Belfedhal, 2021,
https://arxiv.org/abs/2104.03152); for hospitals as in Stripelis et al., "Secure federated learning for neuroimaging",
2022, https://arxiv.org/abs/2205.05249.

The sites share one secret key. They encrypt, the server adds, and one site decrypts the sum and sends it to the server.
A site that colludes with the server can therefore decrypt every other site's update. ``SecureSum`` needs no such trust,
and about a fourteenth of the bytes and a thirtieth of the time; this is for sites whose rules require encryption.

There is no noise flooding. CKKS decrypts to the message plus an error that depends on the secret key, and a party with
ciphertexts *and* their decryption can compute the key from the two: Baiyu Li and Daniele Micciancio, "On the Security
of Homomorphic Encryption on Approximate Numbers", EUROCRYPT 2021, https://eprint.iacr.org/2020/1533. The server has
both, so it must be assumed to be able to read every update. Encryption protects updates from parties with ciphertexts
only, such as a network, a store or a backup, and from a server that never receives a decrypted sum. The remedy is
normal noise on each decrypted number, with a standard deviation of 2^(s/2) times the error's for s bits of security,
for which no parameters here leave room: at s = 40 it is 2^20 times an error of about 1e-8, compared with updates of
about 1e-3.
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
    """Cost of encryption: ciphertexts, their bytes, and the ratio to the bytes of the plain numbers."""

    chunks: int
    nbytes: int
    times: float

    def __str__(self) -> str:
        return f"{self.chunks} ciphertexts, {self.nbytes / 1e6:.1f} MB a site, {self.times:.1f} times the plain numbers"


@dataclass(frozen=True)
class Keys:
    """A key pair.

    Attributes:
        secret: Decrypts. For the sites only.
        public: Encrypts and adds. For all parties.
    """

    secret: bytes
    public: bytes

    @classmethod
    def make(cls) -> "Keys":
        """Create a key pair with 128 bits of security."""
        context = _tenseal().context(_tenseal().SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(MODULI))
        context.global_scale = SCALE
        secret = context.serialize(save_secret_key=True)
        context.make_context_public()
        return cls(secret, context.serialize())


def cost(size: int, keys: Keys) -> Cost:
    """Return the cost of encrypting ``size`` numbers, from the size of an actual ciphertext."""
    one = len(next(encrypt(torch.zeros(1), keys.public)))
    chunks = math.ceil(size / SLOTS)
    return Cost(chunks, chunks * one, chunks * one / (4 * size))


def encrypt(vector: Tensor, public: bytes) -> Iterator[bytes]:
    """Yield ciphertexts of ``vector`` [size], in order.

    Raises:
        ValueError: If a number is not finite.
    """
    if not bool(vector.isfinite().all()):
        raise ConfigError("NaN and infinities cannot be encrypted: lower the learning rate")
    context = _tenseal().context_from(public)
    for chunk in vector.double().split(SLOTS):
        yield _tenseal().ckks_vector(context, chunk.tolist()).serialize()


def add(chunks: Sequence[bytes], public: bytes, size: int) -> bytes:
    """Return the encrypted sum of one ciphertext of ``size`` numbers from each site.

    Raises:
        ValueError: If one is corrupt or of another size. An empty one would otherwise count as an empty vector.
    """
    context, total = _tenseal().context_from(public), None
    for number, chunk in enumerate(chunks):
        one = _opened(context, chunk, size, f"ciphertext {number}")
        total = one if total is None else total + one
    if total is None:
        raise ConfigError("there is nothing to add")
    ciphertext: bytes = total.serialize()
    return ciphertext


def decrypt(chunk: bytes, secret: bytes, size: int) -> Tensor:
    """Decrypt the numbers in a ciphertext. Shape [size], float64.

    Raises:
        ValueError: If it is corrupt or of another size.
    """
    numbers = _opened(_tenseal().context_from(secret), chunk, size, "the sum").decrypt()
    return torch.tensor(numbers[:size], dtype=torch.float64)


def encrypted_merge(replies: Mapping[str, Reply], keys: Keys, *, memory: int | None = None) -> Reply:
    """Compute ``merge(replies.values())`` on ciphertexts, to about seven digits.

    Args:
        replies: Replies by site. They may contain weighted means only.
        keys: The sites' keys; addition uses the public half only.
        memory: Maximum bytes of one site's ciphertexts; half of this machine's memory by default.

    Raises:
        ValueError: If a reply contains anything but means, if replies differ in form, or if they are too large.
    """
    vectors, like = {}, next(iter(replies.values()))
    for site, reply in sorted(replies.items()):
        if odd := sorted(part for part, stat in reply.parts.items() if not isinstance(stat, WeightedMean)):
            raise ConfigError(f"{site} sends {odd}, which are not means: only sums can be added in encryption")
        if _layout(reply) != _layout(like):
            raise ConfigError(f"{site} would send tensors with other names or shapes than the others")
        vectors[site] = _vector(reply)
    size = len(next(iter(vectors.values())))
    price, allowed = cost(size, keys), memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if price.nbytes > allowed:
        raise ConfigError(
            f"encrypted, this model takes {price}, but {allowed / 1e6:.0f} MB are allowed: use SecureSum, which "
            "takes no more bytes than the model itself"
        )
    streams = [encrypt(vector, keys.public) for vector in vectors.values()]
    parts = []
    for index in range(price.chunks):
        count = min(SLOTS, size - index * SLOTS)
        parts.append(decrypt(add([next(stream) for stream in streams], keys.public, count), keys.secret, count))
    return _reply(torch.cat(parts), like)


def _layout(reply: Reply) -> list[tuple[str, str, tuple[int, ...]]]:
    parts = sorted(reply.parts)
    return [(part, name, tuple(leaf.shape)) for part in parts for name, leaf in reply.mean(part).total.items()]


def _vector(reply: Reply) -> Tensor:
    """Concatenate all summed values: the numbers and the weight of each part."""
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
        ciphertext = _tenseal().ckks_vector_from(context, chunk)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{what} is corrupt: {error}") from None
    if ciphertext.size() != size:
        raise ConfigError(f"{what} contains {ciphertext.size()} numbers, expected {size}")
    return ciphertext


def _tenseal() -> Any:
    try:
        import tenseal
    except ImportError as error:
        raise MissingDependency("he", "encrypted sums need tenseal") from error
    return tenseal
