"""The server's side of the exchange: asks go out as numbered calls, answers come back as replies that stay on the disk.

A ``core.train.Federation`` over any ``Carrier``: FLARE carries between hospitals (``controller``), and the tests carry
within a process. What the drivers, the methods and the results see is the same.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from polyclinic.core.method import Ask
from polyclinic.core.site import Site
from polyclinic.core.state import Corrupt
from polyclinic.core.stats import Reply
from polyclinic.core.train import Arrival
from polyclinic.engines.flare import wire
from polyclinic.engines.flare.homes import private_folder
from polyclinic.engines.flare.journals import SharedJournal
from polyclinic.engines.flare.messages import VERSION, Answer, BadMessage, Call, printable
from polyclinic.engines.flare.order import Order

TICK = 0.25


class Delivery(NamedTuple):
    """Something that came from a site: the text of its answer, or the reason why there is none, and the file beside it.

    ``take`` writes the file to a path, at most so many bytes, and returns its length and SHA-256; it raises ``OSError``
    where it cannot.
    """

    site: str
    text: object
    take: Callable[[Path, int], tuple[int, str]]
    reason: str = ""


class Carrier(Protocol):
    """What carries messages. Sites are known to it by name, and it vouches for who sent what."""

    def post(self, calls: Sequence[Call], body: Path | None) -> None:
        """Sends each call to its site, and with each the same file."""

    def arrived(self, seconds: float) -> Delivery | None:
        """What has come, after waiting at most so long. Raises ``Ended`` where the job was ended."""

    def away(self, site: str) -> bool:
        """Whether a site is known to be unreachable."""

    def drop(self, site: str) -> None:
        """Stops waiting for a site; what it was called for is void."""


class Ended(RuntimeError):
    """The job was ended from outside."""


@dataclass(frozen=True)
class Count:
    """Where the conversation stands: the last message's number, and the last of each site's that was answered."""

    number: int = 0
    answered: Mapping[str, int] = field(default_factory=dict)


@dataclass
class _Pending:
    """A call that is not answered yet."""

    call: Call
    body: Path
    since: float
    again: bool = False


class FlareFederation:
    """A server that can reach sites in other houses.

    Attributes:
        count: Where the conversation stands. Saved with the server's state, it resumes a run to the bit.
    """

    def __init__(
        self, order: Order, carrier: Carrier, folder: Path, journal: SharedJournal, sites: Sequence[str],
        seed: int, count: Count = Count(), limit: int = 2**32,
    ) -> None:  # fmt: skip
        """Opens the conversation of ``order`` with ``sites``.

        Args:
            folder: Where messages lie while they are under way.
            count: Where an earlier conversation stood.
            limit: The largest reply in bytes.
        """
        self.server = Site("server", seed=seed)
        self.count = count
        self._order, self._hash, self._carrier, self._journal, self._limit = order, order.hash, carrier, journal, limit
        self._sites, self._confirmed = sorted(sites), dict(count.answered)
        self._folder = private_folder(folder)
        self._pending: dict[str, _Pending] = {}
        for old in folder.iterdir():
            old.unlink()

    @property
    def sites(self) -> Sequence[str]:
        """Every site's name, in order."""
        return self._sites

    def send(self, ask: Ask, to: Sequence[str]) -> None:
        """Calls the sites named. Each receives what is for it and nothing else."""
        if ask.secure:
            raise ValueError(
                "secure sums between hospitals are not wired yet: leave secure-sum out of the study's send"
            )
        self._tidy()
        self.count = replace(self.count, number=self.count.number + 1)
        for name in (n for n in to if n in self._pending):
            self._carrier.drop(name)
        if ask.each:
            for name in to:
                self._post(ask.at(name), [name], f"{self.count.number}-{name}.ask")
        elif to:
            self._post(ask, to, f"{self.count.number}.ask")

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yields answers as they arrive. A site that is away, or late, is lost, and what it sends later is dropped."""
        while self._pending:
            if (delivery := self._carrier.arrived(TICK)) is not None and (arrival := self._hear(delivery)):
                yield arrival
            now = time.monotonic()
            for name, pending in list(self._pending.items()):
                late = deadline is not None and now - pending.since > deadline
                if late or self._carrier.away(name):
                    reason = f"no answer within {deadline:g} s" if late else "the site is away"
                    del self._pending[name]
                    self._carrier.drop(name)
                    yield self._lost(pending.call, reason)

    def confirm(self) -> None:
        """Says that the server's disk holds everything up to here; sites learn it with the next call."""
        self._confirmed = dict(self.count.answered)

    def _post(self, ask: Ask, to: Sequence[str], file: str) -> None:
        body = self._folder / file
        size, sha256 = wire.write(body, ask, durable=False)
        number = self.count.number
        asked = {"number": number, "round": ask.round, "job": ask.job, "to": list(to), "ask": sha256, "bytes": size}
        head = self._journal.write("asked", asked)
        calls = [
            Call(
                VERSION, self._order.run, number, name, head, size, sha256, "do", self._hash, ask.round, ask.job,
                self.count.answered.get(name, 0), self._confirmed.get(name, 0), self._order.deadline or 0.0, "",
            )
            for name in to
        ]  # fmt: skip
        for call in calls:
            self._pending[call.site] = _Pending(call, body, time.monotonic())
        self._carrier.post(calls, body)

    def _hear(self, delivery: Delivery) -> Arrival | None:
        """What a delivery amounts to: None where it is nothing that anybody waits for."""
        pending = self._pending.get(delivery.site)
        try:
            answer = Answer.from_json(delivery.text)
            if answer.site != delivery.site or answer.run != self._order.run:
                raise BadMessage(f"it speaks for {answer.site} in {answer.run}")
        except BadMessage as error:
            if pending is None:
                return None
            del self._pending[delivery.site]
            why = printable(delivery.reason) if delivery.text is None else f"its answer cannot be read: {error}"
            return self._lost(pending.call, why)
        if pending is None or answer.number != pending.call.number:
            self._journal.write("late or repeated, dropped", {"number": answer.number, "site": answer.site})
            return None
        if answer.forgot and not pending.again:
            self._begin_anew(pending)
            return None
        del self._pending[delivery.site]
        if answer.lost or not answer.size:
            return self._lost(pending.call, printable(answer.lost or "an answer without a reply"), answer)
        try:
            reply = self._take(delivery, answer)
        except (OSError, Corrupt) as error:
            return self._lost(pending.call, f"its reply was refused: {printable(str(error))}", answer)
        self.count = replace(self.count, answered={**self.count.answered, answer.site: answer.number})
        self._write("answered", pending.call, answer, {"reply": answer.sha256, "bytes": answer.size})
        return Arrival(answer.site, pending.call.round, reply, "", answer.seconds)

    def _take(self, delivery: Delivery, answer: Answer) -> Reply:
        if answer.size > self._limit:
            raise Corrupt(f"{answer.size} bytes, beyond the limit of {self._limit}")
        path = self._folder / f"{answer.number}-{answer.site}.reply"
        if delivery.take(path, answer.size) != (answer.size, answer.sha256):
            path.unlink(missing_ok=True)
            raise Corrupt("the file is not the one that its message names")
        reply = wire.read_reply(path)
        path.unlink()  # its pages live as long as somebody holds the reply
        return reply

    def _begin_anew(self, pending: _Pending) -> None:
        """A site lost its memory: it starts again from nothing, and the journal says so."""
        call, answered = pending.call, dict(self.count.answered)
        self._journal.write("site begins anew", {"site": call.site, "number": call.number, "after": call.after})
        answered.pop(call.site, None)
        self._confirmed.pop(call.site, None)
        self.count = replace(self.count, answered=answered)
        pending.call, pending.again = replace(call, after=0, confirmed=0), True
        self._carrier.post([pending.call], pending.body)

    def _lost(self, call: Call, reason: str, answer: Answer | None = None) -> Arrival:
        self._write("lost", call, answer, {"reason": reason})
        return Arrival(call.site, call.round, None, reason, answer.seconds if answer else 0.0)

    def _write(self, event: str, call: Call, answer: Answer | None, details: Mapping[str, object]) -> None:
        said = {"head": answer.head, "signature": answer.signature} if answer else {}
        self._journal.write(event, {"number": call.number, "round": call.round, "site": call.site, **details, **said})

    def _tidy(self) -> None:
        waiting = {pending.body for pending in self._pending.values()}
        for path in self._folder.iterdir():
            if path.suffix == ".ask" and path not in waiting:
                path.unlink()
