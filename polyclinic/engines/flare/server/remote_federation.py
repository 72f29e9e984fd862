"""Implementation of ``core.rounds.Federation`` over a message transport.

FLARE transports messages between organizations (``controller``); the tests transport them within a process. Run loops,
methods and results are identical in both cases.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from polyclinic.core.method import Request
from polyclinic.core.rounds import Arrival
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
    """Server that communicates with remote sites."""

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
        """Open the message exchange of ``order`` with ``sites``.

        Args:
            folder: Folder of messages in transit.
            signers: The sites' keys; every answer must be signed by one of them.
            count: Progress of an earlier exchange to continue.
            limits: Limits on the size of replies.
        """
        self.server = Site("server", seed=seed)
        self._sites = sorted(sites)
        self._exchange = Exchange(order, carrier, folder, journal, count, signers, limits)
        self._secure: tuple[Request, tuple[str, ...]] | None = None
        self._kind = "do"

    @property
    def sites(self) -> Sequence[str]:
        """The names of all sites, sorted."""
        return self._sites

    @property
    def count(self) -> Count:
        """Progress of the message exchange. Saved with the server state, it makes a resumed run bit-identical."""
        return self._exchange.count

    def confirm(self) -> None:
        """Record that the server has stored everything so far; the next call informs each site."""
        self._exchange.confirmed = dict(self.count.answered)

    def keep(self, answered: Mapping[str, int]) -> None:
        """Record the last message of each site in the best model; the next call informs each site."""
        self._exchange.keep = dict(answered)

    def look_back(self) -> None:
        """Score from the site state that was kept for the best model from now on."""
        self._kind = "look"

    def send(self, request: Request, to: Sequence[str]) -> None:
        """Call the sites in ``to``. Each receives only its own part of the request."""
        self._exchange.next()
        self._secure = (request, tuple(to)) if request.secure else None
        if request.per_site:
            for name in to:
                self._exchange.post(request.for_site(name), [name], self._kind, request.round, request.job)
        elif to:
            self._exchange.post(request, to, self._kind, request.round, request.job)

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yield answers as they arrive. A site that is away or late is lost, and its later answer is dropped.

        Without a ``deadline`` that of the run request applies, also to scores and in buffered mode.
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
                path.unlink(missing_ok=True)  # its pages remain until the reply is released
            yield Arrival(call.site, call.round, reply, lost, seconds)
