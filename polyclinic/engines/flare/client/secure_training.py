"""Site half of a secure sum, in the training process: checks the session against the approved study, and masks.

Session keys exist only here, for one sum. The server chooses neither the roster nor the threshold freely: the roster
consists of approved sites that train, and the threshold is at least that of the approved pipeline, two thirds of the
roster (``default_threshold``), the number of sites whose noise the accounting relies on, and the policy's own minimum.
The site agent decides which sums may be opened (``opened_sums``).

A session abandoned before this site has revealed anything discloses nothing: its masks derive from keys of that session
only, which are then deleted, so that the masked vectors of two sessions for one content are independent and uniformly
random. Sites that reveal have recorded the roster first. Any two groups of two thirds of nearly the same sites have an
honest site in common, so two rosters that differ by less than ``opened_sums`` allows are never both opened unless a
third of the sites collude with the server.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core.pipeline import Transform
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.paths import SetupError
from polyclinic.secure_aggregation import SecureSum, vector_of
from polyclinic.secure_aggregation.client import SecureSite
from polyclinic.secure_aggregation.secure_messages import Advert, Agreed
from polyclinic.secure_aggregation.session_keys import ProtocolError, Session, default_threshold


@dataclass(frozen=True)
class Demands:
    """Requirements of the approved pipeline on every sum.

    Attributes:
        sites: The sites that may take part.
        threshold: Smallest number of sites that must complete it.
        capacity: Largest number of sites whose sum does not wrap around.
    """

    sites: frozenset[str]
    threshold: int
    capacity: int

    @classmethod
    def of(cls, transforms: Sequence[Transform], sites: Sequence[str]) -> "Demands":
        """Return the requirements of ``transforms``; noise shared among sites requires as many sites as it assumes."""
        shares = [int(getattr(transform, "share", 0)) for transform in transforms]
        sums = [transform for transform in transforms if isinstance(transform, SecureSum)]
        threshold = max([0, *shares, *(transform.threshold or 0 for transform in sums)])
        return cls(frozenset(sites), threshold, min([len(sites), *(transform.capacity for transform in sums)]))

    def least(self, roster: int, min_sites: int) -> int:
        """Return the smallest threshold of a sum over ``roster`` sites if the policy requires ``min_sites``."""
        return max(self.threshold, default_threshold(roster), min_sites)


class SecureTraining:
    """State of the secure sum that this site currently takes part in."""

    def __init__(self, site: str, identities: Mapping[str, str], own: Path, demands: Demands) -> None:
        """``identities`` are the sites' public keys as approved with the run request; ``own`` is the folder of this
        site's keys.
        """
        self.site, self.identities, self.own, self.demands = site, dict(identities), own, demands
        self._session: SecureSite | None = None
        self._alive: tuple[str, ...] = ()
        self._least = 0
        self._known: set[str] = set()

    def step(self, command: Mapping[str, Any], min_sites: int) -> dict[str, Any]:
        """Execute one stage: read its file, write the answer's, and return the roster of the sum.

        Raises:
            ProtocolError: If the server requests what a site must not do.
        """
        value = tensor_file.read(Path(command["body"]))
        match command["stage"]:
            case "advertise":
                answer: Any = self._begin(value, command, min_sites)
            case "share":
                answer = self._now.share(_all(value, Advert))
            case "mask":
                if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
                    raise ProtocolError("an inbox must be a table of sealed shares")
                answer = self._now.mask(value, vector_of(tensor_file.read(Path(command["vector"]))))
            case "agree":
                answer = self._agree(value, min_sites)
            case "reveal":
                answer = self._now.reveal(_all(value, Agreed))
                self._session = None
            case other:
                raise ProtocolError(f"a secure sum has no stage {other!r}")
        size, sha256 = tensor_file.write(Path(command["out"]), answer)
        return {
            "lost": "",
            "seconds": 0.0,
            "size": size,
            "sha256": sha256,
            "alive": list(self._alive),
            "min_sites": min_sites,
        }

    @property
    def _now(self) -> SecureSite:
        if self._session is None:
            raise ProtocolError("no secure sum is in progress here: it began before the training process started")
        return self._session

    def _begin(self, session: Any, command: Mapping[str, Any], min_sites: int) -> Advert:
        self._session, self._alive = None, ()
        if not isinstance(session, Session):
            raise ProtocolError("a secure sum begins with a session")
        if strange := sorted(s for s, key in session.identities.items() if self.identities.get(s) != key):
            raise ProtocolError(f"{strange[0]} has another key, or another name, than was approved here")
        if strange := sorted(session.identities.keys() - self.demands.sites):
            raise ProtocolError(f"{strange[0]} is not one of the approved sites that train")
        if session.id in self._known:
            raise ProtocolError("this session was begun before; a retry needs a new session")
        if session.round != command["round"]:
            raise ProtocolError(f"a sum for round {session.round}, and the round is {command['round']}")
        if (peers := len(session.identities)) > self.demands.capacity:
            raise ProtocolError(f"a sum over {peers} sites, and the approved one has room for {self.demands.capacity}")
        self._least = self.demands.least(peers, min_sites)
        if session.threshold < self._least:
            raise ProtocolError(
                f"a sum over {peers} sites, of which {session.threshold} must stay: here it is at "
                f"least {self._least} ({self._why(peers, min_sites)})"
            )
        if session.size != (size := len(vector_of(tensor_file.read(Path(command["vector"]))))):
            raise ProtocolError(f"the session is for {session.size} numbers, and this site has {size}")
        try:
            key = site_keys.for_sums(self.own, self.identities.get(self.site, ""))
        except SetupError as error:
            raise ProtocolError(str(error)) from None
        self._known.add(session.id)
        self._session = SecureSite(session, self.site, key)
        return self._session.advertise()

    def _why(self, peers: int, min_sites: int) -> str:
        reasons = {
            "the policy here, require.min_sites": min_sites,
            "the approved threshold, and the sites whose noise is assumed": self.demands.threshold,
            f"two thirds of {peers}": default_threshold(peers),
        }
        return next(why for why, least in reasons.items() if least == self._least)

    def _agree(self, alive: Any, min_sites: int) -> Agreed:
        if not isinstance(alive, tuple | list) or not all(isinstance(name, str) for name in alive):
            raise ProtocolError("the sites that arrived must be a list of names")
        if (count := len(set(alive))) < (least := max(self._least, min_sites)):
            raise ProtocolError(f"{count} sites arrived, and a sum here needs {least}")
        self._alive = tuple(sorted(set(alive)))
        return self._now.agree(alive)


def _all(value: Any, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(item, kind) for item in value):
        raise ProtocolError(f"a list of {kind.__name__} was expected")
    return tuple(value)
