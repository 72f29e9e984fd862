"""The server's side of the exchange as the drivers see it: a ``core.rounds.Federation`` over any carrier.

FLARE carries between hospitals (``controller``), and the tests carry within a process. What the drivers, the methods
and the results see is the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.core.method import Request
from polyclinic.core.rounds import Arrival, undiscounted
from polyclinic.core.serialization import Corrupt
from polyclinic.core.site import Site
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.expected_signers import Signers
from polyclinic.engines.flare.protocol.message_limits import Limits
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.rpc import Carrier, Count, Exchange
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.engines.flare.server.secure_aggregation import secure_sum


class FlareFederation:
    """A server that can reach sites in other houses."""

    def __init__(
        self,
        order: RunRequest,
        carrier: Carrier,
        folder: Path,
        journal: SharedJournal,
        sites: Sequence[str],
        seed: int,
        signers: Signers,
        count: Count = Count(),
        limits: Limits = Limits(),
    ) -> None:
        """Opens the conversation of ``order`` with ``sites``.

        Args:
            folder: Where messages lie while they are under way.
            signers: The sites' keys, under which every answer must be signed.
            count: Where an earlier conversation stood.
            limits: How large a reply may be.
        """
        self.server = Site("server", seed=seed)
        self._sites = sorted(sites)
        self._exchange = Exchange(order, carrier, folder, journal, count, signers, limits)
        self._secure: tuple[Request, tuple[str, ...]] | None = None
        self._kind = "do"

    @property
    def sites(self) -> Sequence[str]:
        """Every site's name, in order."""
        return self._sites

    @property
    def count(self) -> Count:
        """Where the conversation stands. Saved with the server's state, it resumes a run to the bit."""
        return self._exchange.count

    def confirm(self) -> None:
        """Says that the server's disk holds everything up to here; sites learn it with the next call."""
        self._exchange.confirmed = dict(self.count.answered)

    def keep(self, answered: Mapping[str, int]) -> None:
        """Says after which message of each site the best model was made; sites learn it with the next call."""
        self._exchange.keep = dict(answered)

    def look_back(self) -> None:
        """From now on sites score with the memory that was kept."""
        self._kind = "look"

    def send(self, request: Request, to: Sequence[str]) -> None:
        """Calls the sites named. Each receives what is for it and nothing else."""
        self._exchange.next()
        self._secure = (request, tuple(to)) if request.secure else None
        if request.per_site:
            for name in to:
                self._exchange.post(request.for_site(name), [name], self._kind, request.round, request.job)
        elif to:
            self._exchange.post(request, to, self._kind, request.round, request.job)

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yields answers as they arrive. A site that is away, or late, is lost, and what it sends later is dropped.

        Without a ``deadline`` the order's holds, for scores and in buffered mode too, so that nobody waits for ever.
        """
        deadline = self._exchange.order.deadline if deadline is None else deadline
        if self._secure is not None:
            yield from secure_sum(self._exchange, *self._secure, deadline)
            return
        for call, path, lost, seconds in self._exchange.outcomes(deadline):
            reply = None
            if path is not None:
                try:
                    reply = tensor_file.read_reply(path)
                    self._exchange.counts(call.number, [call.site])
                except Corrupt as error:
                    lost = self._exchange.lost(call, f"its reply was refused: {printable(str(error))}").lost
                path.unlink(missing_ok=True)  # its pages live as long as somebody holds the reply
            yield Arrival(call.site, call.round, reply, lost, seconds)


def discount_of(method: Any) -> Callable[[int], float]:
    """The weight of an answer by its age, as ``method`` or the method it wraps defines; 1 if neither does."""
    while method is not None:
        if callable(found := getattr(method, "discount", None)):
            return found  # type: ignore[no-any-return]
        method = getattr(method, "inner", None)
    return undiscounted
