"""The server's side of a secure sum."""

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, islice
from typing import TypeVar

import torch
from torch import Tensor

from polyclinic.secure_aggregation import shamir
from polyclinic.secure_aggregation.client import check_advert, commitment
from polyclinic.secure_aggregation.secure_messages import Advert, Agreed, Masked, Reveal, Shares
from polyclinic.secure_aggregation.session_keys import (
    ProtocolError,
    Session,
    X25519PrivateKey,
    add_masks_,
    check_signature,
    digest,
    pair_mask,
    public,
    shared_key,
    vector_problem,
)

Message = TypeVar("Message", Advert, Shares, Masked, Agreed, Reveal)


class SecureServer:
    """The server in one session. Each step takes messages in any order, and returns the next messages to send.

    An invalid message counts as not sent, and its site as lost; the reason is in ``refused``.

    Attributes:
        refused: The reasons for refused messages, by site.
    """

    def __init__(self, session: Session) -> None:
        """Create the server of ``session``."""
        self.session, self.refused = session, dict[str, str]()
        self._adverts: dict[str, Advert] = {}
        self._shared: tuple[str, ...] = ()
        self._alive: tuple[str, ...] = ()
        self._sum = torch.zeros(0, dtype=torch.int32)
        self._next = "adverts"

    def adverts(self, messages: Iterable[Advert]) -> tuple[Advert, ...]:
        """Step 1: return the adverts to send to every site that advertised."""
        self._adverts = self._usable("adverts", "shares", messages, self.session.roster, self._advert)
        return tuple(self._adverts.values())

    def shares(self, messages: Iterable[Shares]) -> dict[str, dict[str, str]]:
        """Step 2: return, for every site that shared, the shares encrypted for it."""
        shared = self._usable("shares", "masked vectors", messages, self._adverts, self._share)
        self._shared = tuple(shared)
        return {to: {site: shared[site].to[to] for site in shared if site != to} for to in shared}

    def masked(self, messages: Iterable[Masked]) -> tuple[str, ...]:
        """Step 3: return the sites whose vectors arrived. Vectors are added on arrival and not stored."""
        self._sum = torch.zeros(self.session.size, dtype=torch.int32)
        self._alive = tuple(self._usable("masked vectors", "agreements", messages, self._shared, self._mask, _emptied))
        return self._alive

    def agreed(self, messages: Iterable[Agreed]) -> tuple[Agreed, ...]:
        """Step 4: return the signed agreements, for every site that arrived."""
        agreed = self._usable("agreements", "revealed shares", messages, self._alive, self._agree)
        return tuple(agreed.values())

    def reveals(self, messages: Iterable[Reveal]) -> Tensor:
        """Step 5: return the sum mod 2³². Shape [size], int32.

        Raises:
            ProtocolError: If too few shares are valid. The message names the site whose secret is missing.
        """
        revealed = self._usable("revealed shares", "nothing", messages, self._alive, self._reveal)
        plus, minus = list[bytes](), list[bytes]()
        for site in self._alive:
            shares = {who: r.seeds[site] for who, r in revealed.items() if site in r.seeds}
            # Σ x_u = Σ y_u - Σ_u PRG(b_u) ± ...
            minus.append(self._rebuilt(site, shares, self._is_seed))
        for site in sorted(set(self._shared) - set(self._alive)):
            shares = {who: r.keys[site] for who, r in revealed.items() if site in r.keys}
            key = X25519PrivateKey.from_private_bytes(self._rebuilt(site, shares, self._is_key))
            for other in self._alive:
                seed = pair_mask(self.session, key, self._adverts[other].mask_key, site, other)
                (minus if other < site else plus).append(seed)
        add_masks_(self._sum, plus, minus)
        return self._sum

    def _usable(
        self,
        step: str,
        then: str,
        messages: Iterable[Message],
        expected: Iterable[str],
        check: Callable[[Message], None],
        keep: Callable[[Message], Message] = lambda message: message,
    ) -> dict[str, Message]:
        """Return the messages of ``expected`` sites that pass ``check``, one per site, in name order."""
        if self._next != step:
            raise ProtocolError(f"the server was given {step} when {self._next} were next")
        expected, valid = set(expected), dict[str, Message]()
        for message in messages:
            try:
                if message.site not in expected:
                    raise ProtocolError(f"{message.site} was not asked for {step}")
                if message.site in valid:
                    raise ProtocolError(f"{message.site} sent {step} twice; the first counts")
                check(message)
                valid[message.site] = keep(message)
            except (ProtocolError, ValueError, AttributeError, TypeError) as error:
                self.refused.setdefault(str(message.site), str(error))
        self._next = then
        if len(valid) < self.session.threshold:
            reasons = "".join(f"; {site}: {reason}" for site, reason in sorted(self.refused.items()))
            raise ProtocolError(
                f"{len(valid)} sites sent {step}, but {self.session.threshold} are required: "
                f"nothing can be summed{reasons}"
            )
        return dict(sorted(valid.items()))

    def _advert(self, message: Advert) -> None:
        check_advert(self.session, message)
        for key in (message.cipher_key, message.mask_key):
            shared_key(self.session, X25519PrivateKey.generate(), key, "trial", message.site, "server")

    def _share(self, message: Shares) -> None:
        check_signature(self.session, message.signature, "shares", message.site, sorted(message.to.items()))
        if message.to.keys() != self._adverts.keys() - {message.site}:
            raise ProtocolError(f"{message.site} did not share its secrets with every site")

    def _mask(self, message: Masked) -> None:
        if problem := vector_problem(self.session, message.vector):
            raise ProtocolError(f"the vector of {message.site} cannot be summed: {problem}")
        check_signature(self.session, message.signature, "masked vector", message.site, digest(message.vector))
        self._sum += message.vector

    def _agree(self, message: Agreed) -> None:
        check_signature(self.session, message.signature, "agreement", message.site, list(message.alive))
        if message.alive != self._alive:
            raise ProtocolError(f"{message.site} signed another list of sites")

    def _reveal(self, message: Reveal) -> None:
        body = (sorted(message.seeds.items()), sorted(message.keys.items()))
        check_signature(self.session, message.signature, "revealed shares", message.site, *body)
        if message.seeds.keys() & message.keys.keys():
            raise ProtocolError(f"{message.site} reveals both secrets of a site")

    def _is_seed(self, site: str, secret: bytes) -> bool:
        return commitment(self.session, secret) == self._adverts[site].commitment

    def _is_key(self, site: str, secret: bytes) -> bool:
        return public(X25519PrivateKey.from_private_bytes(secret)) == self._adverts[site].mask_key

    def _rebuilt(self, site: str, shares: Mapping[str, str], right: Callable[[str, bytes], bool]) -> bytes:
        """Rebuild the secret of ``site``, verified against its advert. Sites with wrong shares are named."""
        points = {}
        for who, share in shares.items():
            try:
                points[who] = bytes.fromhex(share)
            except (ValueError, TypeError):
                self.refused.setdefault(who, f"its share of the secrets of {site} is not valid")
        for chosen in islice(combinations(sorted(points), self.session.threshold), 1000):
            try:
                secret = shamir.rebuild({self.session.place(who): points[who] for who in chosen})
            except ValueError:
                continue
            if right(site, secret):
                line = {self.session.place(who): int.from_bytes(points[who]) for who in chosen}
                for who in points.keys() - set(chosen):
                    if int.from_bytes(points[who]) != shamir.evaluate(line, self.session.place(who)):
                        self.refused.setdefault(who, f"its share of the secrets of {site} contradicts the others")
                return secret
        raise ProtocolError(
            f"{len(points)} shares of the secrets of {site} do not match its advert: they are "
            "corrupt, or too few. Start a new session; if this happens again, without this site"
        )


def _emptied(message: Masked) -> Masked:
    return Masked(message.site, torch.empty(0), message.signature)
