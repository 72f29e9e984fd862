"""The site's side of a secure sum."""

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

    This object deliberately has state: the protocol is insecure if a site answers the same request twice, which a pure
    function cannot prevent. Each step can be taken once and in order. After a refusal, and after the last step, the
    keys are deleted.
    """

    def __init__(
        self, session: Session, name: str, identity: Ed25519PrivateKey, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        """Create the site ``name``, which the others identify by the public half of ``identity``.

        Raises:
            ProtocolError: If the session has another key for this site, or none.
        """
        if session.identities.get(name) != public(identity):
            raise ProtocolError(f"this session does not list {name} with its key")
        self.session, self.name, self._identity, self._entropy = session, name, identity, entropy
        self._next = "advertise"
        self._cipher: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(entropy(32))
        self._mask: X25519PrivateKey | None = X25519PrivateKey.from_private_bytes(entropy(32))
        self._seed, self._own = entropy(32), b""
        self._adverts: dict[str, Advert] = {}
        self._sealed: dict[str, str] = {}
        self._alive: tuple[str, ...] = ()

    def advertise(self) -> Advert:
        """Step 1: return this site's signed public keys."""
        with self._step("advertise", "share"):
            cipher, mask = self._keys()
            body = (public(cipher), public(mask), commitment(self.session, self._seed))
            return Advert(self.name, *body, signature(self.session, self._identity, "advert", self.name, *body))

    def share(self, adverts: Iterable[Advert]) -> Shares:
        """Step 2: return shares of this site's secrets, each encrypted for one of the sites that advertised.

        Raises:
            ProtocolError: If too few advertised, one did so twice or without its signature, or the server
                changed this site's advert.
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
                raise ProtocolError(f"the server does not forward the advert of {self.name}")
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
        """Step 3: return this site's masked vector.

        Args:
            inbox: Shares encrypted for this site, by sender. Only these sites and this one can be summed.
            vector: Shape [size], int32.

        Raises:
            ProtocolError: If too few sites sent shares, or one did that had not advertised.
        """
        with self._step("mask", "agree"):
            if unknown := sorted(inbox.keys() - self._adverts.keys()):
                raise ProtocolError(f"{unknown[0]} sent shares but did not advertise")
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
        """Step 4: sign the list of the sites whose vectors arrived.

        Raises:
            ProtocolError: If the list is too short, includes a site that shared no secrets, or omits this site.
        """
        with self._step("agree", "reveal"):
            listed = list(alive)
            self._alive = tuple(sorted(set(listed)))
            if len(self._alive) != len(listed):
                raise ProtocolError("the server lists a site twice among those that arrived")
            if self.name not in self._alive:
                raise ProtocolError(f"the server lists {self.name} as lost, so it reveals nothing")
            if unknown := sorted(set(self._alive) - self._sealed.keys() - {self.name}):
                raise ProtocolError(f"the server lists {unknown[0]} as arrived, but it shared no secrets")
            self._enough(self._alive, "arrived")
            signed = signature(self.session, self._identity, "agreement", self.name, list(self._alive))
            return Agreed(self.name, self._alive, signed)

    def reveal(self, agreed: Iterable[Agreed]) -> Reveal:
        """Step 5: return the shares that the server needs to unmask the sum, and delete the keys.

        Raises:
            ProtocolError: Unless enough of the listed sites have signed the list that this site received.
        """
        with self._step("reveal", "over"):
            signers = set()
            for message in agreed:
                check_signature(self.session, message.signature, "agreement", message.site, list(message.alive))
                if message.alive != self._alive:
                    raise ProtocolError(f"the server sent {message.site} and {self.name} different lists of sites")
                if message.site not in self._alive or message.site in signers:
                    raise ProtocolError(f"{message.site} is not on the list of sites, or agreed twice")
                signers.add(message.site)
            self._enough(signers, "agreed on the sites that arrived")
            shares = {self.name: self._own} | {site: share for site in self._sealed if (share := self._opened(site))}
            seeds = {site: share[shamir.SHARE_BYTES :].hex() for site, share in shares.items() if site in self._alive}
            keys = {site: share[: shamir.SHARE_BYTES].hex() for site, share in shares.items() if site not in seeds}
            signed = signature(
                self.session, self._identity, "revealed shares", self.name, sorted(seeds.items()), sorted(keys.items())
            )
            self._forget()
            return Reveal(self.name, seeds, keys, signed)

    def _opened(self, site: str) -> bytes | None:
        """Decrypt the shares that ``site`` encrypted for this one; None if they were altered."""
        cipher, _ = self._keys()
        key = shared_key(self.session, cipher, self._adverts[site].cipher_key, "shares", site, self.name)
        share = unseal(key, self._sealed[site], f"{site}/{self.name}")
        return share if share and len(share) == 2 * shamir.SHARE_BYTES else None

    def _keys(self) -> tuple[X25519PrivateKey, X25519PrivateKey]:
        if self._cipher is None or self._mask is None:
            raise ProtocolError(f"{self.name} has deleted its keys: this session is over")
        return self._cipher, self._mask

    def _enough(self, sites: Iterable[str], what: str) -> None:
        if (count := len(set(sites))) < self.session.threshold:
            raise ProtocolError(f"{count} sites {what}, but {self.session.threshold} are required")

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
    """Return a commitment of a site to its seed, which does not reveal the seed."""
    return hashlib.sha256(bytes.fromhex(session.context) + seed).hexdigest()


def check_advert(session: Session, advert: Advert) -> None:
    """Verify that the sender signed the advert for this session.

    Raises:
        ProtocolError: If the signature is not valid. The message names the sender.
    """
    body = (advert.cipher_key, advert.mask_key, advert.commitment)
    check_signature(session, advert.signature, "advert", advert.site, *body)
