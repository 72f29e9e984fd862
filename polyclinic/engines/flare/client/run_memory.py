"""What a site keeps of one run: memory keyed by message, settled when the server confirms, else rolled back.

A link holds what came of one message: the reply that was sent, and the memory after it. The server says from which
link to go on (``after``) and up to which its own disk is safe (``confirmed``). Links before ``confirmed`` are dropped,
links beyond ``after`` are undone: their message was lost, or the server crashed before it had written. Content that
comes a second time, under its number or another, gets the same reply again, so that nothing is trained, and no privacy
spent, twice. What was answered stands in ``usage``, which no rollback changes.

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

from polyclinic.engines.flare.client.request_usage import Answered, Usage
from polyclinic.engines.flare.protocol.paths import hash_of, private_folder, read_json, write_private
from polyclinic.errors import ProtocolError

SPARE = 2


class OldMessage(ProtocolError):
    """A message that the server itself has settled: a replay, or a server restored from an older copy."""


@dataclass(frozen=True)
class Link:
    """What came of one message.

    Attributes:
        number: Which message. ``after``: from which one's memory it began. ``request``: the SHA-256 of its file.
        round: What it was for, and ``job``.
        size: The length of the reply's file, and ``sha256`` its hash; 0 and empty where there is none.
        memory: The file that holds the memory after it; empty where there is nothing to keep.
        seconds: How long the work took.
        secure: Whether the reply leaves only under masks.
        content: Of a reply for a secure sum, the digest of its values before they were coded.
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
    """The links of one run, in order, and what had been confirmed.

    Attributes:
        sent: Bytes sent by round, for the policy's limit.
        spare: The last links that were undone, whose replies may be asked for again.
    """

    confirmed: int = 0
    links: tuple[Link, ...] = ()
    sent: tuple[tuple[int, int], ...] = ()
    spare: tuple[Link, ...] = ()

    def link(self, number: int) -> Link | None:
        """The link of a message, if it is there."""
        return next((link for link in self.links if link.number == number), None)

    def same(self, number: int, after: int, request: str) -> Link | None:
        """The link of this very message, which began from the same memory, if it was answered before."""
        link = self.link(number)
        return link if link is not None and (link.after, link.request) == (after, request) else None


class RunMemory:
    """The folder of one run at a site."""

    def __init__(self, folder: Path) -> None:
        """Opens or makes it."""
        self.folder = private_folder(folder)
        table = read_json(self.folder / "chain.json", default={})
        links = tuple(Link(**link) for link in table.get("links", ()))
        sent = tuple((int(r), int(n)) for r, n in table.get("sent", ()))
        spare = tuple(Link(**link) for link in table.get("spare", ()))
        self.chain = Chain(int(table.get("confirmed", 0)), links, sent, spare)

    @cached_property
    def usage(self) -> Usage:
        """What was asked and answered.

        Raises:
            Broken: If somebody changed the record.
        """
        return Usage(self.folder / "usage.jsonl")

    def settle(self, after: int, confirmed: int, number: int, keep: int = 0) -> None:
        """Drops what is confirmed, from the disk with the next link; but for the link ``keep``, which the test needs.

        Raises:
            OldMessage: Where the server goes back behind what it had confirmed.
        """
        back = bool(self.chain.links) and min(confirmed, after) < self.chain.confirmed
        if back or number <= self.chain.confirmed:
            raise OldMessage(
                f"message {number} begins before message {self.chain.confirmed}, which the server had confirmed: it is "
                "a replay, or the server was restored from an older copy. A person here may allow it with "
                "`polyclinic site forget RUN`"
            )
        if confirmed > self.chain.confirmed:
            kept = tuple(link for link in self.chain.links if link.number >= confirmed or link.number == keep)
            spare = tuple(link for link in self.chain.spare if link.number >= confirmed)
            self.chain = replace(self.chain, confirmed=confirmed, links=kept, spare=spare)

    def undo(self, after: int) -> tuple[int, ...]:
        """Removes links beyond ``after``, and returns their numbers."""
        undone = tuple(link for link in self.chain.links if link.number > after)
        if undone:
            left = tuple(link for link in self.chain.links if link.number <= after)
            self._store(replace(self.chain, links=left, spare=(*self.chain.spare, *undone)[-SPARE:]))
        return tuple(link.number for link in undone)

    def before(self, after: int) -> Path | None:
        """The memory to begin with: None where there is nothing.

        Raises:
            KeyError: Where the memory after that message is not here.
        """
        if after == 0:
            return None
        link = self.chain.link(after)
        if link is None or (link.memory and not (self.folder / link.memory).exists()):
            raise KeyError(after)
        return self.folder / link.memory if link.memory else None

    def add(self, link: Link) -> None:
        """Remembers a link; its files are on the disk already."""
        sent = dict(self.chain.sent)
        sent[link.round] = sent.get(link.round, 0) + link.size
        recent = tuple(sorted(sent.items()))[-100:]
        self._store(replace(self.chain, links=(*self.chain.links, link), sent=recent))

    def kept_reply(self, answered: Answered) -> Link | None:
        """The link of what was ``answered`` before, if its reply is still here, unchanged."""
        links = (*self.chain.spare, *self.chain.links)
        link = next((one for one in reversed(links) if one.sha256 == answered.sha256), None)
        if not answered.times or link is None:
            return None
        reply = self.reply(link.number)
        return link if reply.exists() and hash_of(reply) == (link.size, link.sha256) else None

    def repeat(self, link: Link, number: int, after: int) -> Link:
        """Gives the reply of ``link`` again under another number, with the memory that the site kept after it."""
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
        """The bytes that were sent in a round."""
        return dict(self.chain.sent).get(round, 0)

    def reply(self, number: int) -> Path:
        """Where the reply to a message lies."""
        return self.folder / f"{number}.reply"

    def layout(self, number: int) -> Path:
        """Where the names and shapes of a reply for a secure sum lie."""
        return self.folder / f"{number}.layout"

    def kept(self, number: int) -> Path:
        """Where the memory after a message lies."""
        return self.folder / f"{number}.memory"

    def begin_anew(self) -> None:
        """Drops a memory that is of no use any more; messages that were settled stay refused."""
        self._store(replace(self.chain, links=(), spare=(*self.chain.spare, *self.chain.links)[-SPARE:]))

    def close(self) -> None:
        """Closes the record of what was answered."""
        if "usage" in self.__dict__:
            self.usage.close()

    def retire(self) -> None:
        """Drops every link of a run that has ended; what it answered stays refused as a replay."""
        last = max((link.number for link in self.chain.links), default=0)
        self._store(replace(self.chain, links=(), confirmed=max(self.chain.confirmed, last)))

    def forget(self) -> None:
        """Removes everything: a person here allows that the run asks again from its beginning."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _store(self, chain: Chain) -> None:
        """Writes the chain first and removes files after, so that a crash leaves files too many, never too few."""
        table: dict[str, Any] = asdict(chain)
        write_private(self.folder / "chain.json", json.dumps(table))
        self.chain = chain
        links = (*chain.links, *chain.spare)
        wanted = {link.memory for link in links}
        wanted |= {path.name for link in links for path in (self.reply(link.number), self.layout(link.number))}
        for path in self.folder.iterdir():
            if path.suffix in (".memory", ".reply", ".layout") and path.name not in wanted:
                path.unlink(missing_ok=True)
