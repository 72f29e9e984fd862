"""Calls from the server to sites and their answers, with one file each way; records which sites were lost and why."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from polyclinic.core.serialization import Corrupt
from polyclinic.engines.flare.protocol import tensor_file
from polyclinic.engines.flare.protocol.expected_signers import Signers
from polyclinic.engines.flare.protocol.message_limits import Limits, check_room
from polyclinic.engines.flare.protocol.messages import VERSION, Answer, BadMessage, Call, printable
from polyclinic.engines.flare.protocol.paths import private_folder
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.errors import RunError

TICK = 0.25
AWAY = "the site is away"


class Delivery(NamedTuple):
    """Delivery from a site: the text of its answer, or the reason why there is none, and the accompanying file.

    ``take`` writes the file to a path, at most the given number of bytes, and returns its length and SHA-256; it raises
    ``OSError`` if it cannot. ``discard`` removes the file.
    """

    site: str
    text: object
    take: Callable[[Path, int], tuple[int, str]]
    reason: str = ""
    discard: Callable[[], None] = lambda: None


class Carrier(Protocol):
    """Message transport. Identifies sites by name and authenticates the sender of each message."""

    def post(self, calls: Sequence[Call], body: Path | None) -> None:
        """Send each call to its site, all with the same file."""

    def arrived(self, seconds: float) -> Delivery | None:
        """Return the next delivery, or None after ``seconds``.

        Raises:
            Ended: If the job was ended.
        """

    def away(self, site: str) -> bool:
        """Return whether a site is known to be unreachable."""

    def drop(self, site: str) -> None:
        """Stop waiting for a site and void its call."""


class Ended(RunError):
    """The job was ended from outside."""


@dataclass(frozen=True)
class Count:
    """Progress of the message exchange: the last message number, and the last message that each site answered."""

    number: int = 0
    answered: Mapping[str, int] = field(default_factory=dict)


class Outcome(NamedTuple):
    """Result of a call: the file that came back, or the reason why there is none."""

    call: Call
    path: Path | None
    lost: str
    seconds: float

    @property
    def site(self) -> str:
        """The called site."""
        return self.call.site


@dataclass
class _Pending:
    """Call that has not been answered."""

    call: Call
    body: Path
    since: float
    again: bool = False


class Exchange:
    """The server's calls of one run.

    Attributes:
        count: Progress of the message exchange.
        keep: For each site the last message that is part of the best model; its site state is kept for the test.
    """

    def __init__(
        self,
        order: RunRequest,
        carrier: Carrier,
        folder: Path,
        journal: SharedJournal,
        count: Count,
        signers: Signers,
        limits: Limits = Limits(),
    ) -> None:
        """Start at ``count``; files in transit are stored in ``folder``.

        Args:
            signers: The sites' keys; every answer must be signed by one of them.
            limits: Limits on the size of replies.
        """
        self.order, self.carrier, self.journal, self.count = order, carrier, journal, count
        self.signers, self.limits = signers, limits
        self.confirmed = dict(count.answered)
        self.keep: Mapping[str, int] = {}
        self._hash = order.hash
        self._folder = private_folder(folder)
        self._pending: dict[str, _Pending] = {}
        for old in folder.iterdir():
            old.unlink()

    def next(self) -> int:
        """Return the number of the next message, and remove files of messages that are no longer pending."""
        waiting = {pending.body for pending in self._pending.values()}
        for path in self._folder.iterdir():
            if path.suffix == ".ask" and path not in waiting:
                path.unlink()
        check_room(self._folder, 0, self.limits.keep_free_megabytes)  # on failure the run waits until there is room
        self.count = replace(self.count, number=self.count.number + 1)
        return self.count.number

    def post(self, value: Any, to: Sequence[str], kind: str, round: int, job: str, stage: str = "") -> None:
        """Call the sites in ``to`` with ``value``, under the current number."""
        number = self.count.number
        for name in to:
            if name in self._pending:
                self.carrier.drop(name)
        body = self._folder / f"{number}-{kind}-{stage}-{to[0]}.ask"
        size, sha256 = tensor_file.write(body, value, durable=False)
        asked = {"number": number, "round": round, "job": job, "to": list(to), "ask": sha256, "bytes": size}
        head = self.journal.write("asked", asked | ({"stage": stage} if stage else {}))
        calls = [
            Call(
                VERSION,
                self.order.run,
                number,
                name,
                head,
                size,
                sha256,
                kind,
                self._hash,
                round,
                job,
                self.count.answered.get(name, 0),
                self.confirmed.get(name, 0),
                self.keep.get(name, 0),
                self.order.deadline or 0.0,
                stage,
            )
            for name in to
        ]
        for call in calls:
            self._pending[call.site] = _Pending(call, body, time.monotonic())
        self.carrier.post(calls, body)

    def outcomes(self, deadline: float | None = None) -> Iterator[Outcome]:
        """Yield the outcome of each call until none is pending. The caller owns the files."""
        while self._pending:
            if (delivery := self.carrier.arrived(TICK)) is not None:
                try:
                    outcome = self._process(delivery)
                finally:
                    delivery.discard()  # remove a file that was not taken
                if outcome is not None:
                    yield outcome
            now = time.monotonic()
            for name, pending in list(self._pending.items()):
                late = deadline is not None and now - pending.since > deadline
                if name in self._pending and (late or self.carrier.away(name)):
                    reason = f"no answer within {deadline:g} s" if late else AWAY
                    del self._pending[name]
                    self.carrier.drop(name)
                    yield self.lost(pending.call, reason)

    def counts(self, number: int, sites: Sequence[str]) -> None:
        """Record that the answers of ``sites`` to message ``number`` are used."""
        self.count = replace(self.count, answered={**self.count.answered, **dict.fromkeys(sites, number)})

    def lost(self, call: Call, reason: str, answer: Answer | None = None) -> Outcome:
        """Record that a call failed."""
        self._write("lost", call, answer, {"job": call.job, "reason": reason})
        return Outcome(call, None, reason, answer.seconds if answer else 0.0)

    def _process(self, delivery: Delivery) -> Outcome | None:
        """Process a delivery; return None if no pending call matches it."""
        pending = self._pending.get(delivery.site)
        try:
            answer = Answer.from_json(delivery.text)
            if answer.site != delivery.site or answer.run != self.order.run:
                raise BadMessage(f"it names {answer.site} in {answer.run}")
            self.signers.check(answer)
        except BadMessage as error:
            if pending is None:
                return None
            del self._pending[delivery.site]
            why = printable(delivery.reason) if delivery.text is None else f"its answer cannot be read: {error}"
            return self.lost(pending.call, why)
        if pending is None or (answer.number, answer.stage) != (pending.call.number, pending.call.stage):
            self.journal.write("late or repeated, dropped", {"number": answer.number, "site": answer.site})
            return None
        if answer.forgot and not pending.again:
            self._begin_anew(pending)
            return None
        del self._pending[delivery.site]
        if answer.lost or not answer.size:
            return self.lost(pending.call, printable(answer.lost or "an answer without a reply"), answer)
        try:
            path = self._take(delivery, answer, pending.call)
        except (OSError, Corrupt) as error:
            return self.lost(pending.call, f"its reply was refused: {printable(str(error))}", answer)
        self._write("answered", pending.call, answer, {"reply": answer.sha256, "bytes": answer.size})
        return Outcome(pending.call, path, "", answer.seconds)

    def _take(self, delivery: Delivery, answer: Answer, call: Call) -> Path:
        if answer.size > (limit := self.limits.reply(call)):
            raise Corrupt(f"its {answer.size} bytes exceed the limit of {limit} bytes for this request")
        path = self._folder / f"{answer.number}-{answer.stage}-{answer.site}.reply"
        if delivery.take(path, answer.size) != (answer.size, answer.sha256):
            path.unlink(missing_ok=True)
            raise Corrupt("the file is not the one that its message names")
        return path

    def _begin_anew(self, pending: _Pending) -> None:
        """Restart a site that lost its site state from none, and record this in the journal."""
        call, answered = pending.call, dict(self.count.answered)
        self.journal.write("site begins anew", {"site": call.site, "number": call.number, "after": call.after})
        answered.pop(call.site, None)
        self.confirmed.pop(call.site, None)
        self.keep = {name: number for name, number in self.keep.items() if name != call.site}
        self.count = replace(self.count, answered=answered)
        pending.call, pending.again = replace(call, after=0, confirmed=0, keep=0), True
        self.carrier.post([pending.call], pending.body)

    def _write(self, event: str, call: Call, answer: Answer | None, details: Mapping[str, object]) -> None:
        signed = {"reply": answer.sha256, "head": answer.head, "signature": answer.signature} if answer else {}
        stage = {"stage": call.stage} if call.stage else {}
        self.journal.write(
            event, {"number": call.number, "round": call.round, "site": call.site, **stage, **details, **signed}
        )
