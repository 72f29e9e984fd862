"""The site's half of a secure sum, in the training process: checks the session against what the site knows, and masks.

Keys live here and nowhere else, for one sum. Below the site's own minimum of peers nothing is masked; and once shares
were revealed for a round, this site helps with no sum over other sites for the same round, for the difference of two
sums would be somebody's update.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyclinic.engines.flare import keys, wire
from polyclinic.engines.flare.homes import BadHome
from polyclinic.transforms.secure import vector_of
from polyclinic.transforms.secure.keys import ProtocolError, Session
from polyclinic.transforms.secure.messages import Advert, Agreed
from polyclinic.transforms.secure.site import SecureSite


class SecureTraining:
    """Whatever sum this site takes part in just now."""

    def __init__(self, site: str, identities: Mapping[str, str], own: Path) -> None:
        """``identities`` are the sites' public keys as a person approved them with the order; ``own``: its keys/."""
        self.site, self.identities, self.own = site, dict(identities), own
        self._session: SecureSite | None = None
        self._alive: tuple[str, ...] = ()

    def step(self, command: Mapping[str, Any], min_sites: int) -> dict[str, Any]:
        """One stage: reads its file, writes the answer's, and says who is in the sum.

        Raises:
            ProtocolError: Where the server asks for what a site must not do.
        """
        value = wire.read(Path(command["body"]))
        match command["stage"]:
            case "advertise":
                answer: Any = self._begin(value, command, min_sites)
            case "share":
                answer = self._now.share(_all(value, Advert))
            case "mask":
                if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
                    raise ProtocolError("an inbox is a table of sealed shares")
                answer = self._now.mask(value, vector_of(wire.read(Path(command["vector"]))))
            case "agree":
                answer = self._agree(value, command["revealed"], min_sites)
            case "reveal":
                answer = self._now.reveal(_all(value, Agreed))
                self._session = None
            case other:
                raise ProtocolError(f"a secure sum has no stage {other!r}")
        size, sha256 = wire.write(Path(command["out"]), answer)
        return {"lost": "", "seconds": 0.0, "size": size, "sha256": sha256, "alive": list(self._alive)}

    @property
    def _now(self) -> SecureSite:
        if self._session is None:
            raise ProtocolError("no secure sum is under way here: it was begun before the training process was")
        return self._session

    def _begin(self, session: Any, command: Mapping[str, Any], min_sites: int) -> Advert:
        self._session, self._alive = None, ()
        if not isinstance(session, Session):
            raise ProtocolError("a secure sum begins with a session")
        if strange := sorted(s for s, key in session.identities.items() if self.identities.get(s) != key):
            raise ProtocolError(f"{strange[0]} has another key, or another name, than was approved here")
        peers = len(session.identities)
        if session.round != command["round"]:
            raise ProtocolError(f"a sum for round {session.round}, and the round is {command['round']}")
        if min(peers, session.threshold) < min_sites:
            raise ProtocolError(f"a sum over {peers} sites, of which {session.threshold} must stay: the policy here "
                                f"asks for {min_sites} (require.min_sites)")  # fmt: skip
        if session.size != (size := len(vector_of(wire.read(Path(command["vector"]))))):
            raise ProtocolError(f"a session for {session.size} numbers, and here are {size}")
        try:
            key = keys.for_sums(self.own, self.identities.get(self.site, ""))
        except BadHome as error:
            raise ProtocolError(str(error)) from None
        self._session = SecureSite(session, self.site, key)
        return self._session.advertise()

    def _agree(self, alive: Any, revealed: list[str], min_sites: int) -> Agreed:
        if not isinstance(alive, tuple | list) or not all(isinstance(name, str) for name in alive):
            raise ProtocolError("who arrived is a list of names")
        if len(set(alive)) < min_sites:
            raise ProtocolError(f"{len(set(alive))} sites arrived, and the policy here asks for {min_sites}")
        if revealed and sorted(alive) != sorted(revealed):
            raise ProtocolError(f"for this round a sum over {', '.join(sorted(revealed))} was opened already; one over "
                                "others would show what a single site sent")  # fmt: skip
        self._alive = tuple(sorted(alive))
        return self._now.agree(alive)


def _all(value: Any, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(item, kind) for item in value):
        raise ProtocolError(f"a list of {kind.__name__} was expected")
    return tuple(value)
