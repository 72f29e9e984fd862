"""The site's half of a secure sum."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from polyclinic.secure_aggregation import shamir
from polyclinic.secure_aggregation.secure_messages import Advert, Agreed, Masked, Reveal, Shares
from polyclinic.secure_aggregation.session_keys import (
    Ed25519PrivateKey,
    ProtocolError,
    Session,
    X25519PrivateKey,
    add_masks_,
    check_signature,
    digest,
    pair_mask,
    public,
    seal,
    shared_key,
    signature,
    unseal,
    vector_problem,
)


class SecureSite:
    """One site in one session, from fresh keys to the end.

    Unlike nearly everything in Polyclinic this object remembers, and on purpose: the protocol is broken by a site
    that answers the same question twice, and a pure function can always be called again. Each step can be taken
    once and in order. After a refusal, and after the last step, the keys are gone.
    """

    def __init__(
        self, session: Session, name: str, identity: Ed25519PrivateKey, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        """A site called ``name``, known to the others by the public half of ``identity``.

        Raises:
            ProtocolError: Where the session does not know this site by this key.
        """
        if session.identities.get(name) != public(identity):
            raise ProtocolError(f"this session does not know {name} by its key")
        self.session, self.name, self._identity, self._entropy = session, name, identity, entropy
        self._next = "advertise"
        self._cipher: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(entropy(32))
        self._mask: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(entropy(32))
        self._seed, self._own = entropy(32), b""
        self._adverts: dict[str, Advert] = {}
        self._sealed: dict[str, str] = {}
        self._alive: tuple[str, ...] = ()

    def advertise(self) -> Advert:
        """Step 1: this site's public keys, signed."""
        with self._step("advertise", "share"):
            cipher, mask = self._keys()
            body = (public(cipher), public(mask), commitment(self.session, self._seed))
            return Advert(self.name, *body, signature(self.session, self._identity, "advert", self.name, *body))

    def share(self, adverts: Iterable[Advert]) -> Shares:
        """Step 2: shares of this site's secrets, each readable by one of the sites that advertised.

        Raises:
            ProtocolError: Where too few advertised, one did so twice or without its signature, or the server
                changed what this site said.
        """
        with self._step("share", "mask"):
            for advert in adverts:
                check_advert(self.session, advert)
                if advert.site in self._adverts:
                    raise ProtocolError(f"{advert.site} advertised twice")
                self._adverts[advert.site] = advert
            self._enough(self._adverts, "advertised")
            cipher, mask = self._keys()
            own = self._adverts.get(self.name)
            if own is None or (own.cipher_key, own.mask_key) != (public(cipher), public(mask)):
                raise ProtocolError(f"the server does not pass on what {self.name} advertised")
            places = [self.session.place(site) for site in self._adverts]
            t = self.session.threshold
            keys = shamir.split(mask.private_bytes_raw(), t, places, self._entropy)
            seeds = shamir.split(self._seed, t, places, self._entropy)
            to = {}
            for site, advert in sorted(self._adverts.items()):
                if site != self.name:
                    key = shared_key(self.session, cipher, advert.cipher_key, "shares", self.name, site)
                    place = self.session.place(site)
                    to[site] = seal(key, keys[place] + seeds[place], f"{self.name}/{site}")
            own_place = self.session.place(self.name)
            self._own = keys[own_place] + seeds[own_place]
            return Shares(
                self.name, to, signature(self.session, self._identity, "shares", self.name, sorted(to.items()))
            )

    def mask(self, inbox: Mapping[str, str], vector: Tensor) -> Masked:
        """Step 3: this site's vector under its masks.

        Args:
            inbox: What the others sealed for this site, by sender. They, and this site, are who can be summed.
            vector: Shape [size], int32.

        Raises:
            ProtocolError: Where too few sites sent shares, or one did that had not advertised.
        """
        with self._step("mask", "agree"):
            if unknown := sorted(inbox.keys() - self._adverts.keys()):
                raise ProtocolError(f"{unknown[0]} sends shares and had not advertised")
            if problem := vector_problem(self.session, vector):
                raise ProtocolError(f"the vector of {self.name} cannot be summed: {problem}")
            self._sealed = {site: sealed for site, sealed in inbox.items() if site != self.name}
            self._enough({self.name, *self._sealed}, "shared their secrets")
            _, mask = self._keys()
            plus, minus = [self._seed], list[bytes]()
            for site in sorted(self._sealed):
                seed = pair_mask(self.session, mask, self._adverts[site].mask_key, self.name, site)
                (plus if self.name < site else minus).append(seed)
            # y_u = x_u + PRG(b_u) + Σ_{v > u} PRG(s_uv) - Σ_{v < u} PRG(s_uv)  (mod 2³²)
            masked = vector.clone()
            add_masks_(masked, plus, minus)
            signed = signature(self.session, self._identity, "masked vector", self.name, digest(masked))
            return Masked(self.name, masked, signed)

    def agree(self, alive: Iterable[str]) -> Agreed:
        """Step 4: a signature under the list of the sites whose vectors arrived.

        Raises:
            ProtocolError: Where the list is too short, names somebody who cannot be on it, or leaves this site out.
        """
        with self._step("agree", "reveal"):
            listed = list(alive)
            self._alive = tuple(sorted(set(listed)))
            if len(self._alive) != len(listed):
                raise ProtocolError("the server lists a site twice among those that arrived")
            if self.name not in self._alive:
                raise ProtocolError(f"the server says that {self.name} was lost; it reveals nothing")
            if unknown := sorted(set(self._alive) - self._sealed.keys() - {self.name}):
                raise ProtocolError(f"the server says that {unknown[0]} arrived, which had shared no secrets")
            self._enough(self._alive, "arrived")
            signed = signature(self.session, self._identity, "agreement", self.name, list(self._alive))
            return Agreed(self.name, self._alive, signed)

    def reveal(self, agreed: Iterable[Agreed]) -> Reveal:
        """Step 5: what the server needs to take the masks off the sum. After it the keys are gone.

        Raises:
            ProtocolError: Unless enough of the sites that arrived have signed the list that this site was given.
        """
        with self._step("reveal", "over"):
            who = set()
            for message in agreed:
                check_signature(self.session, message.signature, "agreement", message.site, list(message.alive))
                if message.alive != self._alive:
                    raise ProtocolError(f"{message.site} was told of other sites than {self.name}: the server lies")
                if message.site not in self._alive or message.site in who:
                    raise ProtocolError(f"{message.site} cannot agree, or did so twice")
                who.add(message.site)
            self._enough(who, "agreed on who arrived")
            shares = {self.name: self._own} | {site: share for site in self._sealed if (share := self._opened(site))}
            seeds = {site: share[shamir.SHARE_BYTES :].hex() for site, share in shares.items() if site in self._alive}
            keys = {site: share[: shamir.SHARE_BYTES].hex() for site, share in shares.items() if site not in seeds}
            signed = signature(
                self.session, self._identity, "revealed shares", self.name, sorted(seeds.items()), sorted(keys.items())
            )
            self._forget()
            return Reveal(self.name, seeds, keys, signed)

    def _opened(self, site: str) -> bytes | None:
        """The shares that ``site`` sealed for this one; None where they were altered on the way."""
        cipher, _ = self._keys()
        key = shared_key(self.session, cipher, self._adverts[site].cipher_key, "shares", site, self.name)
        share = unseal(key, self._sealed[site], f"{site}/{self.name}")
        return share if share and len(share) == 2 * shamir.SHARE_BYTES else None

    def _keys(self) -> tuple[X25519PrivateKey, X25519PrivateKey]:
        if self._cipher is None or self._mask is None:
            raise ProtocolError(f"{self.name} has forgotten its keys: this session is over")
        return self._cipher, self._mask

    def _enough(self, sites: Iterable[str], what: str) -> None:
        if (count := len(set(sites))) < self.session.threshold:
            raise ProtocolError(f"{count} sites {what}, and {self.session.threshold} are needed")

    @contextmanager
    def _step(self, step: str, then: str) -> Iterator[None]:
        if self._next != step:
            self._forget()
            raise ProtocolError(
                f"{self.name} was asked to {step} when {self._next!r} was next: messages came twice or out of order"
            )
        try:
            yield
        except BaseException:
            self._next = "nothing, after a refusal,"
            self._forget()
            raise
        self._next = then

    def _forget(self) -> None:
        self._cipher = self._mask = None
        self._seed = self._own = b""


def commitment(session: Session, seed: bytes) -> str:
    """What binds a site to its seed without showing it."""
    return hashlib.sha256(bytes.fromhex(session.context) + seed).hexdigest()


def check_advert(session: Session, advert: Advert) -> None:
    """Raises unless the advert is its sender's own, for this session.

    Raises:
        ProtocolError: Naming the sender.
    """
    body = (advert.cipher_key, advert.mask_key, advert.commitment)
    check_signature(session, advert.signature, "advert", advert.site, *body)
