"""Site state of one run, keyed by message: settled when the server confirms it, otherwise rolled back.

A link is the result of one message: the reply that was sent, and the site state after it. The server says from which
link to continue (``after``) and up to which link its own disk is safe (``confirmed``). Links before ``confirmed`` are
dropped. Links beyond ``after`` are undone: their message was lost, or the server crashed before it had written. Content
that arrives again, under its number or another, gets the same reply, so that nothing is trained and no privacy budget
is spent twice. The answers are recorded in ``usage``, which no rollback changes.

    confirmed        after
        │              │
    ... 7 ────────── 9 ────────── 12 (undone)          files: 7.memory  9.memory 9.reply
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.client.request_usage import Answered, Usage
from polyclinic.engines.flare.protocol.paths import hash_of, private_folder, read_json
from polyclinic.errors import ProtocolError

SPARE = 2


class OldMessage(ProtocolError):
    """Message that the server itself has settled: a replay, or a server restored from an older copy."""


@dataclass(frozen=True)
class Link:
    """Result of one message.

    Attributes:
        number: The message. ``after``: the message whose site state it started from. ``request``: SHA-256 of its file.
        round: Round of the request. ``job``: its job.
        size: Length of the reply's file. ``sha256``: its hash. 0 and empty if there is none.
        memory: File of the site state after it; empty if there is none.
        seconds: Computing time.
        secure: Whether the reply leaves only under masks.
        content: Of a reply for a secure sum, the digest of its values before encoding.
    """

    number: int
    after: int
    request: str
    round: int
    job: str
    size: int
    sha256: str
    memory: str
    seconds: float
    secure: bool = False
    content: str = ""


@dataclass(frozen=True)
class Chain:
    """Links of one run, in order, and the last confirmed message.

    Attributes:
        sent: Bytes sent by round, for the policy's limit.
        spare: The last undone links, whose replies may be requested again.
    """

    confirmed: int = 0
    links: tuple[Link, ...] = ()
    sent: tuple[tuple[int, int], ...] = ()
    spare: tuple[Link, ...] = ()

    def link(self, number: int) -> Link | None:
        """Return the link of a message, if there is one."""
        return next((link for link in self.links if link.number == number), None)

    def same(self, number: int, after: int, request: str) -> Link | None:
        """Return the link of this exact message, started from the same site state, if it was answered before."""
        link = self.link(number)
        return link if link is not None and (link.after, link.request) == (after, request) else None


class RunMemory:
    """Folder of the site state of one run."""

    def __init__(self, folder: Path) -> None:
        """Open or create the folder."""
        self.folder = private_folder(folder)
        table = read_json(self.folder / "chain.json", default={})
        links = tuple(Link(**link) for link in table.get("links", ()))
        sent = tuple((int(r), int(n)) for r, n in table.get("sent", ()))
        spare = tuple(Link(**link) for link in table.get("spare", ()))
        self.chain = Chain(int(table.get("confirmed", 0)), links, sent, spare)

    @property
    def weights(self) -> Path:
        """The part of the start weights that the server has sent; it is continued after an interruption."""
        return self.folder / "weights.received"

    @property
    def wrong_weights(self) -> int:
        """Number of files that came as start weights and were not those of the study."""
        return int(read_json(self.folder / "wrong-weights.json", default={"count": 0})["count"])

    def count_wrong_weights(self) -> None:
        """Record that another file came as start weights."""
        write_private(self.folder / "wrong-weights.json", json.dumps({"count": self.wrong_weights + 1}))

    @cached_property
    def usage(self) -> Usage:
        """The record of requests and answers.

        Raises:
            Broken: If the record was changed.
        """
        return Usage(self.folder / "usage.jsonl")

    def settle(self, after: int, confirmed: int, number: int, keep: int = 0) -> None:
        """Drop what is confirmed, from disk with the next link, except the link ``keep``, which the test needs.

        Raises:
            OldMessage: If the server goes back behind what it had confirmed.
        """
        back = bool(self.chain.links) and min(confirmed, after) < self.chain.confirmed
        if back or number <= self.chain.confirmed:
            raise OldMessage(
                f"message {number} starts before message {self.chain.confirmed}, which the server had confirmed: it is "
                "a replay, or the server was restored from an older copy. A person at this site may allow it with "
                "`polyclinic site forget RUN`"
            )
        if confirmed > self.chain.confirmed:
            kept = tuple(link for link in self.chain.links if link.number >= confirmed or link.number == keep)
            spare = tuple(link for link in self.chain.spare if link.number >= confirmed)
            self.chain = replace(self.chain, confirmed=confirmed, links=kept, spare=spare)

    def undo(self, after: int) -> tuple[int, ...]:
        """Remove links beyond ``after``, and return their numbers."""
        undone = tuple(link for link in self.chain.links if link.number > after)
        if undone:
            left = tuple(link for link in self.chain.links if link.number <= after)
            self._store(replace(self.chain, links=left, spare=(*self.chain.spare, *undone)[-SPARE:]))
        return tuple(link.number for link in undone)

    def before(self, after: int) -> Path | None:
        """Return the file of the site state to start from, or None if there is none.

        Raises:
            KeyError: If this site does not have the state after that message.
        """
        if after == 0:
            return None
        link = self.chain.link(after)
        if link is None or (link.memory and not (self.folder / link.memory).exists()):
            raise KeyError(after)
        return self.folder / link.memory if link.memory else None

    def add(self, link: Link) -> None:
        """Store a link, whose files are on disk already."""
        sent = dict(self.chain.sent)
        sent[link.round] = sent.get(link.round, 0) + link.size
        recent = tuple(sorted(sent.items()))[-100:]
        self._store(replace(self.chain, links=(*self.chain.links, link), sent=recent))

    def kept_reply(self, answered: Answered) -> Link | None:
        """Return the link of what was ``answered`` before, if its reply is still stored and unchanged."""
        links = (*self.chain.spare, *self.chain.links)
        link = next((one for one in reversed(links) if one.sha256 == answered.sha256), None)
        if not answered.times or link is None:
            return None
        reply = self.reply(link.number)
        return link if reply.exists() and hash_of(reply) == (link.size, link.sha256) else None

    def repeat(self, link: Link, number: int, after: int) -> Link:
        """Give the reply of ``link`` again under another number, with the site state after it."""
        for old, new in (
            (self.reply(link.number), self.reply(number)),
            (self.layout(link.number), self.layout(number)),
        ):
            if old.exists() and old != new:
                new.unlink(missing_ok=True)
                os.link(old, new)
        repeated = replace(link, number=number, after=after)
        links = tuple(one for one in self.chain.links if one.number <= after)
        spare = (*self.chain.spare, *(one for one in self.chain.links if one.number > after))
        self._store(replace(self.chain, links=(*links, repeated), spare=spare[-SPARE:]))
        return repeated

    def sent_in(self, round: int) -> int:
        """Return the bytes that were sent in a round."""
        return dict(self.chain.sent).get(round, 0)

    def reply(self, number: int) -> Path:
        """Return the path of the reply to a message."""
        return self.folder / f"{number}.reply"

    def layout(self, number: int) -> Path:
        """Return the path of the names and shapes of a reply for a secure sum."""
        return self.folder / f"{number}.layout"

    def kept(self, number: int) -> Path:
        """Return the path of the site state after a message."""
        return self.folder / f"{number}.memory"

    def begin_anew(self) -> None:
        """Drop an unusable site state; settled messages remain refused."""
        self._store(replace(self.chain, links=(), spare=(*self.chain.spare, *self.chain.links)[-SPARE:]))

    def close(self) -> None:
        """Close the record of answers."""
        if "usage" in self.__dict__:
            self.usage.close()

    def retire(self) -> None:
        """Drop every link of an ended run; what it answered remains refused as a replay."""
        last = max((link.number for link in self.chain.links), default=0)
        self._store(replace(self.chain, links=(), confirmed=max(self.chain.confirmed, last)))

    def forget(self) -> None:
        """Remove everything: a person at this site allows the run to start again."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _store(self, chain: Chain) -> None:
        """Write the chain first and remove files afterwards, so that a crash leaves surplus files but never missing
        ones.
        """
        table: dict[str, Any] = asdict(chain)
        write_private(self.folder / "chain.json", json.dumps(table))
        self.chain = chain
        links = (*chain.links, *chain.spare)
        wanted = {link.memory for link in links}
        wanted |= {path.name for link in links for path in (self.reply(link.number), self.layout(link.number))}
        for path in self.folder.iterdir():
            if path.suffix in (".memory", ".reply", ".layout") and path.name not in wanted:
                path.unlink(missing_ok=True)
