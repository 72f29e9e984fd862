"""Messages between sites and server during one secure sum. Every message of a site is signed.

The order is that of Bonawitz et al., figure 4: adverts, shares, masked vectors, agreement, shares revealed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from polyclinic.core.serialization import savable


@savable("secure-sum.Advert", 1)
@dataclass(frozen=True)
class Advert:
    """A site's fresh public keys, and a commitment to its own mask's seed."""

    site: str
    cipher_key: str
    mask_key: str
    commitment: str
    signature: str


@savable("secure-sum.Shares", 1)
@dataclass(frozen=True)
class Shares:
    """Encrypted shares of the sender's secret key and of its seed, by receiver; each receiver can read its own."""

    site: str
    to: Mapping[str, str]
    signature: str


@savable("secure-sum.Masked", 1)
@dataclass(frozen=True)
class Masked:
    """A site's masked vector."""

    site: str
    vector: Tensor
    signature: str


@savable("secure-sum.Agreed", 1)
@dataclass(frozen=True)
class Agreed:
    """A site's signature of the list of sites whose vectors arrived: ``alive``, in name order."""

    site: str
    alive: tuple[str, ...]
    signature: str


@savable("secure-sum.Reveal", 1)
@dataclass(frozen=True)
class Reveal:
    """Shares of the seeds of sites that arrived, and of the keys of lost sites; never both of one site."""

    site: str
    seeds: Mapping[str, str]
    keys: Mapping[str, str]
    signature: str
